// Draws with WebGL. A `Painter` keeps the buffers of one frame on the graphics card, and draws them as often as the camera moves.

const POINT_SHADER = `
  attribute vec3 place;       // whole steps from the origin, 0 to 65535
  attribute float intensity;  // 0 to 1
  uniform mat4 view;
  uniform vec3 origin, steps, scale[5];
  uniform vec2 heights;
  uniform float size, byIntensity;
  varying vec3 color;
  void main() {
    vec3 meters = origin + place * steps;
    gl_Position = view * vec4(meters, 1.0);
    gl_PointSize = size;
    float height = (meters.z - heights.x) / (heights.y - heights.x);
    float share = clamp(mix(height, sqrt(intensity), byIntensity), 0.0, 1.0) * 4.0;
    color = scale[0];
    for (int i = 1; i < 5; i++) color = mix(color, scale[i], clamp(share - float(i - 1), 0.0, 1.0));
  }`;

// A cell is a square whose size follows from its distance. That is quick, and exact enough to see where cells are.
const CELL_SHADER = `
  attribute vec3 place, tint;
  uniform mat4 view;
  uniform vec3 origin, steps;
  uniform float meters, pixels;
  varying vec3 color;
  void main() {
    gl_Position = view * vec4(origin + place * steps, 1.0);
    gl_PointSize = clamp(meters * pixels / max(gl_Position.w, 0.01), 1.0, 48.0);
    color = tint;
  }`;

const LINE_SHADER = `
  attribute vec3 place, tint;
  uniform mat4 view;
  varying vec3 color;
  void main() {
    gl_Position = view * vec4(place, 1.0);
    color = tint;
  }`;

const FLAT_COLOR = `
  precision mediump float;
  varying vec3 color;
  uniform float alpha;
  void main() { gl_FragColor = vec4(color, alpha); }`;

class Painter {
  // `complain` is called with a sentence when nothing can be drawn.
  constructor(canvas, complain) {
    this.canvas = canvas;
    // No antialiasing: where a processor draws instead of a graphics card, it doubles the time of a picture.
    const gl = canvas.getContext("webgl", { antialias: false });
    if (!gl) {
      complain("This browser offers no WebGL, so nothing can be drawn. Another browser, or hardware acceleration in its settings, may help.");
      return;
    }
    canvas.addEventListener("webglcontextlost", () => complain("The graphics card was taken away from this page. Load the page again."));
    this.gl = gl;
    this.programs = {
      points: this.#program(POINT_SHADER, ["place", "intensity"]),
      cells: this.#program(CELL_SHADER, ["place", "tint"]),
      lines: this.#program(LINE_SHADER, ["place", "tint"]),
    };
    this.parts = new Map(); // what is on the graphics card, by the name of its layer
    gl.enable(gl.DEPTH_TEST);
    gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
    gl.clearColor(0.055, 0.067, 0.086, 1);
  }

  get ready() {
    return Boolean(this.gl);
  }

  #program(vertexShader, attributes) {
    const gl = this.gl;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertexShader], [gl.FRAGMENT_SHADER, FLAT_COLOR]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    attributes.forEach((name, index) => gl.bindAttribLocation(program, index, name));
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    const uniforms = {};
    for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i += 1) {
      const name = gl.getActiveUniform(program, i).name.replace("[0]", "");
      uniforms[name] = gl.getUniformLocation(program, name);
    }
    return { program, uniforms };
  }

  // Put a part of the picture on the graphics card, instead of an earlier part of this name.
  // `first` and `second` are the values of the program's two attributes: an array, the numbers per vertex, and whether they become 0..1.
  put(name, part) {
    this.remove(name);
    const gl = this.gl;
    const buffers = [part.first, part.second].map(({ values, width, shares }) => {
      const buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      const type = { Float32Array: gl.FLOAT, Uint16Array: gl.UNSIGNED_SHORT, Uint8Array: gl.UNSIGNED_BYTE }[values.constructor.name];
      return { buffer, type, width, shares };
    });
    this.parts.set(name, { ...part, buffers, count: part.first.values.length / part.first.width });
  }

  remove(name) {
    this.parts.get(name)?.buffers.forEach(({ buffer }) => this.gl.deleteBuffer(buffer));
    this.parts.delete(name);
  }

  clear() {
    for (const name of [...this.parts.keys()]) this.remove(name);
  }

  // Draw everything that `isShown` lets through. `looks` are uniforms that the reader can change. `share` of the points and cells is drawn:
  // they come in random order, so a part of them shows the whole scene, only thinner.
  draw(camera, isShown, looks, share = 1) {
    const { gl, canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const view = camera.matrix(width, height);
    const pixels = height / 2 / Math.tan(FIELD_OF_VIEW / 2);
    for (const [name, part] of this.parts) {
      const count = part.mode === "POINTS" ? Math.ceil(part.count * share) : part.count;
      if (count && isShown(name)) this.#drawPart(part, count, { view, pixels, alpha: 1, ...part.uniforms, ...looks });
    }
  }

  #drawPart(part, count, values) {
    const gl = this.gl;
    const { program, uniforms } = this.programs[part.program];
    gl.useProgram(program);
    for (const [name, place] of Object.entries(uniforms)) {
      const value = values[name];
      if (name === "view") gl.uniformMatrix4fv(place, false, value);
      else if (name === "heights") gl.uniform2fv(place, value);
      else if (Array.isArray(value)) gl.uniform3fv(place, value);
      else gl.uniform1f(place, value);
    }
    part.buffers.forEach(({ buffer, type, width, shares }, index) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(index);
      gl.vertexAttribPointer(index, width, type, shares, 0, 0);
    });
    const seeThrough = values.alpha < 1;
    if (seeThrough) gl.enable(gl.BLEND);
    gl.depthMask(!seeThrough);
    gl.drawArrays(gl[part.mode], 0, count);
    gl.depthMask(true);
    gl.disable(gl.BLEND);
  }
}
