"""Where each laser ray of one turn ends: on the ground, on an object, in a bush, or nowhere.

A scene is a height field (a sum of waves) and some hundred analytic parts, each a tapered box, an ellipsoid or an upright cylinder that may turn about
the vertical. The sensor stands at the origin. Three tricks keep a full turn of 130,000 rays below 0.2 s on one core: only the parts whose footprint
covers an azimuth are tried there; the ground is sampled once per azimuth and shared by all beams; all randomness is a hash of (seed, ray,
purpose), so a ray's fate depends on nothing else, and the camera view is exactly a subset of the full turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...core.compiled import compiled
from .sensors import Sensor

BOX, ELLIPSOID, CYLINDER = 0, 1, 2

# Columns of a part, all float64. half_*: half sizes at the part's bottom. taper_*: how far the top face steps in (box only).
# pass_chance: share of rays that go through (glass, spokes). free_path: m a ray flies inside on average (leaves), 0 = solid.
# gloss: share of rays that are mirrored away and never come back (paint, glass).
(
    KIND,
    X,
    Y,
    Z,
    COS,
    SIN,
    HALF_X,
    HALF_Y,
    HALF_Z,
    TAPER_FRONT,
    TAPER_REAR,
    TAPER_SIDE,
    REFLECTIVITY,
    PASS_CHANCE,
    FREE_PATH,
    GLOSS,
    OBJECT,
) = range(17)

# Columns of a wave: height += amplitude x (sin(kx x + ky y + phase) - sin(phase)), so the ground under the sensor stays put.
AMPLITUDE, WAVE_X, WAVE_Y, PHASE = range(4)

SIMULATOR_VERSION = 1  # raise it when the same seed gives other bytes

_PROFILE_STEPS = 160
_GROUND_REFLECTIVITY = 0.22  # asphalt at 905 nm, about 0.15 to 0.3
_DROP, _RANGE_NOISE, _INTENSITY, _TILT, _TURN, _PARTS = 1, 2, 3, 4, 5, 16  # purposes of a random number


@dataclass(frozen=True, kw_only=True)
class Hits:
    """The answered pulses of one turn, column by column."""

    points: np.ndarray
    """(N, 4) float32 x, y, z in m and intensity."""
    objects: np.ndarray
    """(N,) int64 index of the object, -1 for the rest of the world."""
    beams: np.ndarray
    """(N,) int64 index into the sensor's elevations."""
    reachable: np.ndarray
    """(O,) int64 rays that would meet the object if it stood alone."""
    visible: np.ndarray
    """(O,) int64 rays that meet the object first, lost pulses included."""


@compiled()
def _uniform(seed: np.uint64, ray: np.uint64, purpose: np.uint64) -> float:
    """In (0, 1), a hash of its arguments: the finaliser of SplitMix64 (Steele et al., 2014), twice."""
    x = seed + ray * np.uint64(0x9E3779B97F4A7C15) + purpose * np.uint64(0xD1B54A32D192ED03)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@compiled()
def _normal(seed: np.uint64, ray: np.uint64, purpose: np.uint64) -> float:
    """Standard normal by Box and Muller."""
    radius = math.sqrt(-2.0 * math.log(_uniform(seed, ray, purpose)))
    return radius * math.cos(2.0 * math.pi * _uniform(seed, ray, purpose + np.uint64(1 << 32)))


@compiled()
def _intersect(part: np.ndarray, dx: float, dy: float, dz: float) -> tuple[float, float, float]:
    """(entry, exit, cosine of incidence) of the ray from the origin along the unit vector d; entry > exit means a miss."""
    c, s = part[4], part[5]
    hx, hy, hz = part[6], part[7], part[8]
    ox, oy, oz = -(c * part[1] + s * part[2]), s * part[1] - c * part[2], -part[3]
    ux, uy = c * dx + s * dy, c * dy - s * dx
    low, high, cosine = -1e30, 1e30, 0.0
    if part[0] == BOX:
        for face in range(6):
            nx, ny, nz, offset = 0.0, 0.0, 0.0, hz
            if face == 0:
                nx, nz, offset = 1.0, part[9] / (2 * hz), hx - part[9] / 2
            elif face == 1:
                nx, nz, offset = -1.0, part[10] / (2 * hz), hx - part[10] / 2
            elif face == 2:
                ny, nz, offset = 1.0, part[11] / (2 * hz), hy - part[11] / 2
            elif face == 3:
                ny, nz, offset = -1.0, part[11] / (2 * hz), hy - part[11] / 2
            elif face == 4:
                nz = 1.0
            else:
                nz = -1.0
            along = nx * ux + ny * uy + nz * dz
            distance = offset - (nx * ox + ny * oy + nz * oz)
            if along < -1e-12:
                if distance / along > low:
                    low = distance / along
                    cosine = -along / math.sqrt(1.0 + nz * nz) if face < 4 else -along
            elif along > 1e-12:
                high = min(high, distance / along)
            elif distance < 0:
                return 1.0, 0.0, 0.0
        return low, high, cosine
    round_z = 1.0 / (hz * hz) if part[0] == ELLIPSOID else 0.0  # a cylinder is an ellipsoid without an end in z
    gx, gy = 1.0 / (hx * hx), 1.0 / (hy * hy)
    a = ux * ux * gx + uy * uy * gy + dz * dz * round_z
    b = ox * ux * gx + oy * uy * gy + oz * dz * round_z
    root = b * b - a * (ox * ox * gx + oy * oy * gy + oz * oz * round_z - 1.0)
    if root <= 0 or a < 1e-12:
        return 1.0, 0.0, 0.0
    root = math.sqrt(root)
    low, high = (-b - root) / a, (-b + root) / a
    nx, ny, nz = (ox + low * ux) * gx, (oy + low * uy) * gy, (oz + low * dz) * round_z
    cosine = -(nx * ux + ny * uy + nz * dz) / math.sqrt(nx * nx + ny * ny + nz * nz)
    if part[0] == CYLINDER:
        if abs(dz) < 1e-12:
            return (low, high, cosine) if abs(oz) <= hz else (1.0, 0.0, 0.0)
        near, far = (-math.copysign(hz, dz) - oz) / dz, (math.copysign(hz, dz) - oz) / dz
        if near > low:
            low, cosine = near, abs(dz)
        high = min(high, far)
    return low, high, cosine


@compiled()
def _cast(
    parts: np.ndarray,
    slopes: np.ndarray,
    starts: np.ndarray,
    candidates: np.ndarray,
    waves: np.ndarray,
    columns: np.ndarray,
    beams: np.ndarray,
    elevations: np.ndarray,
    sensor: np.ndarray,
    seed: np.uint64,
    points: np.ndarray,
    objects: np.ndarray,
    rings: np.ndarray,
    reachable: np.ndarray,
    visible: np.ndarray,
) -> int:
    """Fill points (n, 4), objects and rings (n,); return how many. `candidates[starts[i]:starts[i + 1]]` are column i's parts."""
    azimuths, height, min_range, max_range = int(sensor[0]), sensor[1], sensor[2], sensor[3]
    range_noise, jitter, reach, dropout, gain, intensity_noise = sensor[4], sensor[5], sensor[6], sensor[7], sensor[8], sensor[9]
    growth = (max_range / 1.0) ** (1.0 / (_PROFILE_STEPS - 1))
    distance = np.empty(_PROFILE_STEPS)
    horizon = np.empty(_PROFILE_STEPS)  # highest slope of the ground seen up to this distance: what lies behind is hidden
    count = 0
    for i in range(len(columns)):
        column = columns[i]
        azimuth = 2 * math.pi * column / azimuths - math.pi
        azimuth += jitter * _normal(seed, np.uint64(column), np.uint64(_TURN))
        ca, sa = math.cos(azimuth), math.sin(azimuth)
        r, top = 1.0, -1e30
        for k in range(_PROFILE_STEPS):
            z = -height
            for w in range(len(waves)):
                z += waves[w, 0] * (math.sin(r * (waves[w, 1] * ca + waves[w, 2] * sa) + waves[w, 3]) - math.sin(waves[w, 3]))
            top = max(top, z / r)
            distance[k], horizon[k] = r, top
            r *= growth
        for beam in beams:
            ray = np.uint64(beam) * np.uint64(azimuths) + np.uint64(column)
            elevation = elevations[beam] + jitter * _normal(seed, ray, np.uint64(_TILT))
            slope, ce = math.tan(elevation), math.cos(elevation)
            dx, dy, dz = ca * ce, sa * ce, math.sin(elevation)
            best, cosine, reflectivity, gloss, hit = max_range + 1.0, 0.0, 0.0, 0.0, -2
            if slope <= horizon[-1] and slope > horizon[0]:
                low, high = 0, _PROFILE_STEPS - 1
                while high - low > 1:
                    middle = (low + high) // 2
                    if horizon[middle] >= slope:
                        high = middle
                    else:
                        low = middle
                # Between two samples the ground is a chord: solve in height, not in slope, which is exact on a plane.
                z0, z1 = horizon[low] * distance[low], horizon[high] * distance[high]
                r = (z0 * distance[high] - z1 * distance[low]) / (slope * (distance[high] - distance[low]) - (z1 - z0))
                best, hit, reflectivity = r / ce, -1, _GROUND_REFLECTIVITY
                gx, gy = 0.0, 0.0
                for w in range(len(waves)):
                    g = waves[w, 0] * math.cos(r * (waves[w, 1] * ca + waves[w, 2] * sa) + waves[w, 3])
                    gx += g * waves[w, 1]
                    gy += g * waves[w, 2]
                cosine = (gx * dx + gy * dy - dz) / math.sqrt(1.0 + gx * gx + gy * gy)
            last = -1
            for k in range(starts[i], starts[i + 1]):
                p = candidates[k]
                if slope < slopes[p, 0] or slope > slopes[p, 1]:
                    continue
                entry, leave, c = _intersect(parts[p], dx, dy, dz)
                if entry > leave or entry <= 0:
                    continue
                if parts[p, 13] > 0 and _uniform(seed, ray, np.uint64(_PARTS + p)) < parts[p, 13]:
                    continue
                if parts[p, 14] > 0:
                    entry -= parts[p, 14] * math.log(_uniform(seed, ray, np.uint64(_PARTS + p)))
                    c = 0.7  # leaves look every way
                    if entry > leave:
                        continue
                owner = int(parts[p, 16])
                if owner >= 0 and owner != last:  # an object's parts follow one another
                    reachable[owner] += 1
                    last = owner
                if entry < best:
                    best, cosine, reflectivity, gloss, hit = entry, c, parts[p, 12], parts[p, 15], owner
            if hit == -2 or best > max_range or best < min_range:
                continue
            if hit >= 0:
                visible[hit] += 1
            facing = math.sqrt(max(cosine, 0.01))
            signal = (reflectivity / 0.1 * facing * (reach / best) ** 2) ** 4  # the 4: a receiver's threshold is sharp
            if _uniform(seed, ray, np.uint64(_DROP)) > (1.0 - dropout) * (1.0 - gloss) * signal / (1.0 + signal):
                continue
            best += range_noise * _normal(seed, ray, np.uint64(_RANGE_NOISE))
            strength = gain * reflectivity * facing * (1.0 + intensity_noise * _normal(seed, ray, np.uint64(_INTENSITY)))
            points[count, 0] = best * dx
            points[count, 1] = best * dy
            points[count, 2] = best * dz
            points[count, 3] = min(max(strength, 0.0), 1.0)
            objects[count] = hit
            rings[count] = beam
            count += 1
    return count


def _extents(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each part, seen from the origin: azimuth of the middle, azimuths of both edges relative to it, and (P, 2) lowest and
    highest slope z / distance. A part around the sensor covers the whole circle."""
    sx, sy = np.array([1, -1, -1, 1]) * parts[:, HALF_X, None], np.array([1, 1, -1, -1]) * parts[:, HALF_Y, None]
    cos, sin = parts[:, COS, None], parts[:, SIN, None]
    x, y = parts[:, X, None] + cos * sx - sin * sy, parts[:, Y, None] + sin * sx + cos * sy
    middle = np.arctan2(parts[:, Y], parts[:, X])
    relative = (np.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    across = np.abs(cos[:, 0] * parts[:, Y] - sin[:, 0] * parts[:, X]) - parts[:, HALF_Y]
    along = np.abs(cos[:, 0] * parts[:, X] + sin[:, 0] * parts[:, Y]) - parts[:, HALF_X]
    near = np.maximum(np.hypot(np.maximum(along, 0), np.maximum(across, 0)), 1e-3)
    far = np.hypot(x, y).max(1)
    bottom, top = parts[:, Z] - parts[:, HALF_Z], parts[:, Z] + parts[:, HALF_Z]
    slopes = np.stack([np.where(bottom < 0, bottom / near, bottom / far), np.where(top > 0, top / near, top / far)], 1)
    around = near < 0.01
    return middle, np.where(around, -np.pi, relative.min(1)), np.where(around, np.pi, relative.max(1)), slopes


def _by_column(parts: np.ndarray, columns: np.ndarray, azimuths: int, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which parts each column can meet: (starts, candidates) and the parts' slopes."""
    middle, left, right, slopes = _extents(parts)
    offset = (2 * np.pi * columns / azimuths - np.pi)[:, None] - middle
    offset = (offset + np.pi) % (2 * np.pi) - np.pi
    column, part = np.nonzero((offset >= left - margin) & (offset <= right + margin))
    starts = np.searchsorted(column, np.arange(len(columns) + 1))
    return starts, part, slopes


def cast(
    parts: np.ndarray, waves: np.ndarray, num_objects: int, sensor: Sensor, *, seed: int, columns: np.ndarray, beams: np.ndarray
) -> Hits:
    """Turn the sensor once over the scene. The result of a ray does not depend on which other rays are fired.

    Args:
        parts: (P, 17) float64, columns as named above, heights relative to the sensor. The parts of one object follow one another.
        waves: (W, 4) float64, the ground.
        num_objects: Number of objects that parts may belong to.
        sensor: The LiDAR, at the origin.
        seed: Seed of the frame.
        columns: Indices of the azimuths to fire; 0 looks backwards, counter-clockwise.
        beams: Indices into `sensor.elevations`.

    Returns:
        The answered pulses.
    """
    jitter = np.deg2rad(sensor.jitter)
    starts, candidates, slopes = _by_column(parts, columns, sensor.azimuths, 6 * jitter)
    size = len(columns) * len(beams)
    points, objects, rings = np.empty((size, 4), np.float32), np.empty(size, np.int64), np.empty(size, np.int64)
    reachable, visible = np.zeros(num_objects, np.int64), np.zeros(num_objects, np.int64)
    settings = np.array(
        [
            sensor.azimuths, sensor.height, sensor.min_range, sensor.max_range, sensor.range_noise,
            jitter, sensor.reach, sensor.dropout, sensor.intensity_gain, sensor.intensity_noise,
        ],
        np.float64,
    )  # fmt: skip
    n = _cast(
        parts, slopes, starts, candidates, waves, columns.astype(np.int64), beams.astype(np.int64),
        np.deg2rad(np.array(sensor.elevations)), settings, np.uint64(seed), points, objects, rings, reachable, visible,
    )  # fmt: skip
    return Hits(
        points=points[:n].copy(), objects=objects[:n].copy(), beams=rings[:n].copy(), reachable=reachable, visible=visible
    )
