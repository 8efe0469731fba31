// The geometry of a box: [x, y, z, length, width, height, yaw], center of the box, meters and radians, yaw counter-clockwise from +x.

// Pairs of points of `outlineOf`. The last one is the tick on the roof, which points where the object heads.
const BOX_EDGES = [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7], [8, 9]];

// Two triangles for each side of a box, as corners of `outlineOf`.
const BOX_FACES = [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]];
const BOX_TRIANGLES = BOX_FACES.flatMap(([a, b, c, d]) => [a, b, c, a, c, d]);

// Ten points: four corners at the bottom, counter-clockwise from the front left one, the same at the top, and the two ends of the tick.
function outlineOf([x, y, z, length, width, height, yaw]) {
  const [cos, sin] = [Math.cos(yaw), Math.sin(yaw)];
  const place = (ahead, left, up) => [
    x + ahead * length * cos - left * width * sin,
    y + ahead * length * sin + left * width * cos,
    z + up * height,
  ];
  const ground = [[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]];
  const corners = [-0.5, 0.5].flatMap((up) => ground.map(([ahead, left]) => place(ahead, left, up)));
  return [...corners, place(0, 0, 0.5), place(0.5, 0, 0.5)];
}

// How far along a ray a box begins, in lengths of the ray's direction; null if the ray misses it or the box lies behind its origin.
// The ray is turned into the frame of the box, where each pair of sides allows a range of distances. The ray hits what all three allow.
function distanceToBox(ray, [x, y, z, length, width, height, yaw]) {
  const [cos, sin] = [Math.cos(yaw), Math.sin(yaw)];
  const turned = ([a, b, c]) => [a * cos + b * sin, b * cos - a * sin, c];
  const origin = turned(along(ray.origin, [x, y, z], -1));
  const direction = turned(ray.direction);
  const half = [length / 2, width / 2, height / 2];
  let [nearest, farthest] = [-Infinity, Infinity];
  for (let axis = 0; axis < 3; axis += 1) {
    if (Math.abs(direction[axis]) < 1e-12) {
      if (Math.abs(origin[axis]) > half[axis]) return null; // it runs beside the box
      continue;
    }
    const one = (-half[axis] - origin[axis]) / direction[axis];
    const other = (half[axis] - origin[axis]) / direction[axis];
    nearest = Math.max(nearest, Math.min(one, other));
    farthest = Math.min(farthest, Math.max(one, other));
  }
  if (nearest > farthest || farthest < 0) return null;
  return Math.max(nearest, 0);
}

// The first box that a ray meets, as an index; -1 if it meets none.
function firstBoxOnRay(ray, boxes) {
  let [best, index] = [Infinity, -1];
  boxes.forEach((box, number) => {
    const distance = distanceToBox(ray, box);
    if (distance !== null && distance < best) [best, index] = [distance, number];
  });
  return index;
}
