"""What `python prepare_data.py demo-scenes` renders: landscapes of textures under a moving camera, to
try the settings for a few real videos.

    python prepare_data.py demo-scenes --max_side 96 --max_fps 12 --max_seconds 2
"""
import numpy as np

from prepare_data import COLOURS, rng

# Colours of the sky at the zenith and at the horizon, and of what is lit.
LIGHTS = {"noon": ((70, 130, 225), (190, 220, 245), (255, 255, 245)),
          "dusk": ((60, 50, 110), (250, 150, 80), (250, 190, 140)),
          "fog": ((150, 160, 170), (205, 210, 212), (205, 210, 215)),
          "night": ((10, 14, 40), (40, 56, 96), (90, 105, 150))}
SCENES = {"hills": ("balloon", (96, 150, 62)), "sea": ("boat", (24, 84, 110)),
          "desert": ("ball", (226, 178, 110))}
CAMERAS = {"still": (0, 1), "pans left": (-0.7, 1), "pans right": (0.7, 1), "zooms in": (0, 1.7)}


def scene_files(n_files=30, seed=0):
    """The plan of demo-scenes, like `demo_files`: two shots a file, every light and scene."""
    files = []
    for i in range(n_files):
        random, shots = rng(seed, "scenes", i), []
        for j in range(2):
            ground, light = list(SCENES)[(i + j) % 3], list(LIGHTS)[(i // 3 + 2 * j) % 4]
            camera = str(random.choice(list(CAMERAS)))
            colour = str(random.choice([c for c in COLOURS if c != "green"]))
            shots.append(dict(
                scene=ground, light=light, camera=camera, colour=colour, frames=48, height=72,
                width=96, seed=(seed, "scene", i, j), captioned=True, caption=f"a {colour} "
                f"{SCENES[ground][0]}, {ground}, {light}, the camera {camera}"))
        files.append({"name": f"scene-{i:03d}.mp4", "fps": 24, "shots": shots,
                      "split": "test" if i % 10 == 9 else "train"})
    return files


def random_texture(random, power, n=128):
    """Periodic noise [n, n] of mean 0.5 in 0..1; a wave of frequency f has the size f**-power."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    f[0, 0] = np.inf
    texture = np.fft.irfft2(np.exp(2j * np.pi * random.random(f.shape)) * f**-power, (n, n))
    return (0.5 + texture / (5 * texture.std())).clip(0, 1)


def look_up(texture, y, x):
    """A periodic texture at real coordinates, between its points bilinear."""
    n, i, j = len(texture), np.floor(y).astype(int), np.floor(x).astype(int)
    a, b = y - i, x - j
    at = lambda k, m: texture[(i + k) % n, (j + m) % n]
    return (1 - a) * ((1 - b) * at(0, 0) + b * at(0, 1)) + a * (
        (1 - b) * at(1, 0) + b * at(1, 1))


def scene_object(kind, u, v, t):
    """(what it covers, how bright it is) of a boat, balloon or ball about (0, 0), of radius 1."""
    r = np.hypot(u, v)
    shade = 0.45 + 0.55 * (1 - np.hypot(u + 0.4, v + 0.45) / 1.7).clip(0, 1)
    if kind == "boat":
        hull, sail = (v > 0.5) & (v < 0.95) & (np.abs(u) < 1.3 - v / 2), (
            (v < 0.45) & (v > -1.2) & (u > -0.1) & (u < 0.6 * (v + 1.2)))
        return hull | sail, np.where(hull, 0.35, 1.1)
    if kind == "balloon":
        basket = (np.abs(u) < 0.25) & (v > 1.25) & (v < 1.6)
        stripes = 0.75 + 0.25 * np.sign(np.sin(7 * u))
        return (r < 1) | basket, np.where(basket, 0.3, shade * stripes)
    turn = np.arctan2(v, u) + 5 * t
    return r < 1, shade * (0.7 + 0.3 * np.sign(np.cos(2 * turn)))


def render_scene(shot):
    """uint8 [T, H, W, 3]: sky with drifting clouds and a sun, ridges or waves, each moved by the
    camera as far as it is near, and the object that crosses it; drawn at twice its size."""
    random, (H, W) = rng(*shot["seed"]), (2 * shot["height"], 2 * shot["width"])
    clouds, rough = random_texture(random, 1.7), random_texture(random, 0.9)
    kind, ground = SCENES[shot["scene"]]
    zenith, low, lit = (np.array(c, float) for c in LIGHTS[shot["light"]])
    ground, colour = np.array(ground) * lit / 255, np.array(COLOURS[shot["colour"]]) * lit / 255
    pan, zoom = CAMERAS[shot["camera"]]
    sun, side, level = random.uniform(-0.5, 0.5), random.choice([-1, 1]), random.uniform(0.25, 0.4)
    y, x = (np.mgrid[:H, :W] + 0.5) / H - np.array([0.5, W / H / 2])[:, None, None]
    mix = lambda a, b, share: a + (b - a) * np.clip(share, 0, 1)[..., None]
    frames = []
    for t in np.linspace(0, 1, shot["frames"]):
        view = lambda depth: (y / (1 + (zoom - 1) * t * depth), pan * depth * (t - 0.5)
                              + x / (1 + (zoom - 1) * t * depth))
        v, u = view(0.15)
        frame = mix(zenith, low, 1.1 + 2 * v)
        frame = mix(frame, lit, 1.2 - np.hypot(u - sun, v + 0.25) * 12)                   # the sun
        frame = mix(frame, lit, 3.5 * look_up(clouds, v * 60, u * 40 + 9 * t) - 2)
        for depth in (0.3, 0.5, 0.8) if shot["scene"] != "sea" else (0.5,):
            v, u = view(depth)
            ridge = depth * 0.55 - 0.16
            if shot["scene"] == "sea":
                ridge, nearness = 0.05, 1 / (v - 0.02).clip(0.03)
                light = look_up(rough, 14 * nearness + 10 * t, 6 * u * nearness) + (
                    0.3 - np.abs(u - sun)).clip(0)
            else:
                ridge = ridge + 0.45 * (1 - depth / 2) * (look_up(clouds, np.full_like(
                    u, 90 * depth), u * 14 + 50 * depth) - 0.5)
                light = look_up(rough, v * 70 / depth, u * 50 / depth)
            face = mix(low, ground * (0.55 + 0.9 * light[..., None]), np.full_like(u, depth + 0.2))
            frame = mix(frame, face, (v - ridge) * H / 2)
        v, u = view(0.8)
        offset = side * (1.1 * t - 0.55)
        height = {"boat": 0.1, "ball": level - 0.1 * np.abs(np.sin(9 * t)),
                  "balloon": -level / 2 - 0.1 * t}[kind]
        size = {"boat": 0.16, "ball": 0.11, "balloon": 0.14}[kind]
        covers, bright = scene_object(kind, (u - offset) / size, (v - height) / size, side * t)
        frame = mix(frame, colour * bright[..., None], covers.astype(float))
        frames.append(frame.reshape(H // 2, 2, W // 2, 2, 3).mean((1, 3)))
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)
