// The camera: it looks at a target point from a distance, and turns around it. The world has x forward, y left and z up, in meters.
// A direction is given by two angles: the azimuth, counter-clockwise from +x, and the elevation above the ground.

const FIELD_OF_VIEW = Math.PI / 4; // of the height of the picture
const STEEPEST = Math.PI / 2; // straight from above

function dot(a, b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

function cross(a, b) {
  return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
}

// a + factor * b
function along(a, b, factor) {
  return [a[0] + factor * b[0], a[1] + factor * b[1], a[2] + factor * b[2]];
}

class OrbitCamera {
  constructor(target, distance) {
    this.home = { target, distance };
    this.fromBehind();
  }

  // Where the driver looks: the camera is behind and above the target.
  fromBehind() {
    this.target = [...this.home.target];
    this.distance = this.home.distance;
    this.azimuth = Math.PI;
    this.elevation = 0.5;
  }

  // The map: x points up in the picture, as in the pictures of `upcycle3d view --out`.
  fromAbove() {
    this.fromBehind();
    this.elevation = STEEPEST;
  }

  // Three directions of length 1, at right angles, and the place of the camera.
  axes() {
    const [az, el] = [this.azimuth, this.elevation];
    const forward = [-Math.cos(el) * Math.cos(az), -Math.cos(el) * Math.sin(az), -Math.sin(el)];
    const right = [-Math.sin(az), Math.cos(az), 0];
    return { forward, right, up: cross(right, forward), eye: along(this.target, forward, -this.distance) };
  }

  // The matrix from meters to WebGL's clip space, column by column.
  matrix(width, height) {
    const { forward, right, up, eye } = this.axes();
    const f = 1 / Math.tan(FIELD_OF_VIEW / 2);
    const [near, far] = [Math.max(0.1, this.distance / 200), this.distance * 10 + 1000];
    const depth = (far + near) / (far - near);
    // Each row takes a point's coordinates along one axis of the camera: right, up, depth, and forward as the divisor.
    const rows = [
      [...right.map((v) => (v * f * height) / width), (-dot(right, eye) * f * height) / width],
      [...up.map((v) => v * f), -dot(up, eye) * f],
      [...forward.map((v) => v * depth), -dot(forward, eye) * depth - (2 * far * near) / (far - near)],
      [...forward, -dot(forward, eye)],
    ];
    return new Float32Array([0, 1, 2, 3].flatMap((column) => rows.map((row) => row[column])));
  }

  // The line of sight through a place of the picture, in pixels from its top left corner.
  ray(x, y, width, height) {
    const { forward, right, up, eye } = this.axes();
    const half = Math.tan(FIELD_OF_VIEW / 2);
    const sideways = along(forward, right, (((2 * x) / width - 1) * half * width) / height);
    return { origin: eye, direction: along(sideways, up, (1 - (2 * y) / height) * half) };
  }

  // Where a point of the world is in the picture, in pixels; null if it is behind the camera.
  screenOf(point, width, height) {
    const { forward, right, up, eye } = this.axes();
    const toPoint = along(point, eye, -1);
    const ahead = dot(toPoint, forward);
    if (ahead <= 0) return null;
    const f = height / 2 / Math.tan(FIELD_OF_VIEW / 2) / ahead; // pixels per meter at this distance
    return [width / 2 + dot(toPoint, right) * f, height / 2 - dot(toPoint, up) * f];
  }

  orbit(dx, dy) {
    this.azimuth -= dx * 0.008;
    this.elevation = Math.min(STEEPEST, Math.max(-STEEPEST, this.elevation + dy * 0.008));
  }

  // Move the target, so that what is under the pointer follows it.
  pan(dx, dy, height) {
    const { right, up } = this.axes();
    const meters = (2 * this.distance * Math.tan(FIELD_OF_VIEW / 2)) / height; // of one pixel, at the target
    this.target = along(along(this.target, right, -dx * meters), up, dy * meters);
  }

  zoom(factor) {
    this.distance = Math.min(2000, Math.max(0.5, this.distance * factor));
  }

  lookAt(point) {
    this.target = [...point];
  }
}
