"""Kill processes of tools/batch_infer.py with SIGKILL at random, and count what comes out.

    python tests/kill_batch_infer.py --images 100000 --kills 12 --seed 1

Kills are spread over the run: of a process with the model, of the command itself (which is started
again), and of Ray's own process. Each image has to be in the results once.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import psutil
import pyarrow.dataset
from tiny import ROOT, draw_shapes

# Before the folder of the tests of backbones/, which Python would take for the package.
sys.path.insert(0, str(ROOT))
from trained_tiny import write_trained

# Seconds without a new file of results after which something hangs.
PATIENCE = 300


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=1000)
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    parser.add_argument('--images-per-file', type=int, default=256)
    parser.add_argument('--kills', type=int, default=4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path, help='default: a temporary one')
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images, results = folder / 'images', folder / 'results'
        draw_images(images, args.images, args.size)
        model = write_trained(folder, 'fpn', draw_shapes(folder / 'shapes'))
        command = [sys.executable, ROOT / 'tools' / 'batch_infer.py', *model, images]
        command += ['--out', results, '--images-per-file', args.images_per_file]
        command = list(map(str, command))
        log = stack.enter_context((folder / 'log.txt').open('ab'))
        killed = run(command, results, args, log)
        return report(images, results, killed)


def draw_images(folder: Path, count: int, size: int) -> None:
    """Noise as JPEGs, a thousand in a folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f'{number // 1000:03d}' / f'{number % 1000:03d}.jpg'
        if number % 1000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (size, size)))


def run(command: Sequence[str], results: Path, args: argparse.Namespace, log: IO) -> Counter:
    """Run the command to its end, whatever is killed; returns what was killed how often."""
    rng = random.Random(args.seed)
    num_files = -(-args.images // args.images_per_file)
    # After so many files of results.
    moments = sorted(rng.sample(range(num_files * 3 // 4), args.kills))
    killed: Counter = Counter()
    begin = last_progress = time.monotonic()
    num_done = 0
    while True:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(rng.uniform(0.2, 1.0))
            now, before = time.monotonic(), num_done
            num_done = sum(1 for _ in results.glob('part-*'))
            last_progress = now if num_done > before else last_progress
            if now - last_progress > PATIENCE:
                process.kill()
                raise TimeoutError(f'no new results for {PATIENCE} s, see {log.name}')
            if moments and num_done > moments[0]:
                what = kill_one(rng, process)
                if what:
                    moments.pop(0)
                    killed[what] += 1
                    print(f'{now - begin:6.1f} s, {num_done} files: killed {what}', flush=True)
        if process.returncode == 0:
            break
    seconds = time.monotonic() - begin
    print(f'{args.images} images in {seconds:.0f} s, {args.images / seconds:.1f} a second')
    return killed


def kill_one(rng: random.Random, command: subprocess.Popen) -> str | None:
    """Kill something; returns what, or None where there was nothing of that kind."""
    kinds = ['a process with the model', 'the command', "Ray's own process"]
    what = rng.choices(kinds, [3, 1, 1])[0]
    if what == 'the command':
        victims = [psutil.Process(command.pid)]
    elif what == "Ray's own process":
        victims = [found for found in descendants(command.pid) if found.name() == 'raylet']
    else:
        victims = [found for found in descendants(command.pid) if is_worker(found)]
    if not victims:
        return None
    rng.choice(victims).kill()
    return what


def is_worker(process: psutil.Process) -> bool:
    try:
        return 'MapWorker' in ' '.join(process.cmdline())
    except psutil.Error:
        return False


def descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def report(images: Path, results: Path, killed: Counter) -> int:
    """Say what is lost or doubled; returns the exit code."""
    expected = {str(path) for path in files_in(images)}
    table = pyarrow.dataset.dataset(results, format='parquet').to_table(['path', 'problem'])
    counts = Counter(table['path'].to_pylist())
    lost = len(expected - counts.keys())
    doubled = sum(count > 1 for count in counts.values())
    problems = len(table) - table['problem'].null_count
    print(f'killed: {dict(killed)}')
    print(f'{len(table)} rows: {lost} lost, {doubled} doubled, {problems} with a problem')
    return int(bool(lost or doubled or problems or len(table) != len(expected)))


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob('*') if path.is_file())


if __name__ == '__main__':
    sys.exit(main())
