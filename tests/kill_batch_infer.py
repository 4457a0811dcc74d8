"""Kill processes of tools/batch_infer.py with SIGKILL at random, and count what comes out.

    python tests/kill_batch_infer.py --images 100000 --kills 12 --seed 1
    python tests/kill_batch_infer.py --images 5000 --kills 6 --machines 2

Kills are spread over the run: of a process with the model, of the command itself (which is started
again), and of Ray's own process on a machine. With --machines there is a cluster of so many besides
the head, as processes of this machine, and one that was killed joins again; without, the cluster is
the command's own. Each image has to be in the results once. memory.png shows what all processes
hold together, without what they share.
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

import cv2
import numpy as np
import psutil
import pyarrow.dataset
from tiny import ROOT, draw_shapes

# Before the folder of the tests of backbones/, which Python would take for the package.
sys.path.insert(0, str(ROOT))
from trained_tiny import write_trained

PORT = 6399
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
    parser.add_argument('--machines', type=int, default=0)
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
        machines = Machines(args.machines)
        stack.callback(machines.stop)
        if args.machines:
            command += ['--address', f'127.0.0.1:{PORT}']
        log = stack.enter_context((folder / 'log.txt').open('ab'))
        killed = run(command, machines, results, args, log, folder)
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


class Machines:
    """A cluster of Ray: a head without room for work, and machines of one core."""

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen] = []
        if count:
            head = ['--head', f'--port={PORT}', '--num-cpus=0', '--include-dashboard=false']
            self._start(head)
            time.sleep(10)
            for _ in range(count):
                self.add()

    def add(self) -> None:
        self._start([f'--address=127.0.0.1:{PORT}', '--num-cpus=1'])

    def _start(self, arguments: Sequence[str]) -> None:
        ray = Path(sys.executable).with_name('ray')
        command = [ray, 'start', '--block', *arguments]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._processes.append(subprocess.Popen(command, **quiet))

    def raylets(self) -> list[psutil.Process]:
        """Ray's own process of each machine but the head."""
        return [child for process in self._processes[1:] for child in named('raylet', process.pid)]

    def processes(self) -> list[psutil.Process]:
        return [child for process in self._processes for child in descendants(process.pid)]

    def stop(self) -> None:
        for process in reversed(self.processes()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self._processes:
            process.kill()


def run(
    command: Sequence[str],
    machines: Machines,
    results: Path,
    args: argparse.Namespace,
    log,
    folder: Path,
) -> Counter:
    """Run the command to its end, whatever is killed; returns what was killed how often."""
    rng = random.Random(args.seed)
    num_files = -(-args.images // args.images_per_file)
    # After so many files of results.
    moments = sorted(rng.sample(range(num_files * 3 // 4), args.kills))
    killed: Counter = Counter()
    memory: list[tuple[float, float]] = []
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
            running = [*descendants(process.pid), *machines.processes()]
            memory.append((now - begin, sum(map(private_bytes, running)) / 2**30))
            if moments and num_done > moments[0]:
                what = kill_one(rng, process, machines)
                if what:
                    moments.pop(0)
                    killed[what] += 1
                    print(f'{now - begin:6.1f} s, {num_done} files: killed {what}', flush=True)
        if process.returncode == 0:
            break
    seconds = time.monotonic() - begin
    print(f'{args.images} images in {seconds:.0f} s, {args.images / seconds:.1f} a second')
    plot(memory, folder / 'memory.png')
    return killed


def kill_one(rng: random.Random, command: subprocess.Popen, machines: Machines) -> str | None:
    """Kill something; returns what, or None where there was nothing of that kind."""
    kinds = ['a process with the model', 'the command', 'a machine']
    what = rng.choices(kinds, [3, 1, 3 if machines.processes() else 1])[0]
    running = [*descendants(command.pid), *machines.processes()]
    if what == 'the command':
        victims = [psutil.Process(command.pid)]
    elif what == 'a machine':
        victims = machines.raylets() or [found for found in running if found.name() == 'raylet']
    else:
        victims = [found for found in running if is_worker(found)]
    if not victims:
        return None
    rng.choice(victims).kill()
    if what == 'a machine' and machines.processes():
        machines.add()
    return what


def is_worker(process: psutil.Process) -> bool:
    try:
        return 'MapWorker' in ' '.join(process.cmdline())
    except psutil.Error:
        return False


def named(name: str, pid: int) -> list[psutil.Process]:
    return [process for process in descendants(pid) if process.name() == name]


def descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def private_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
        return memory.rss - memory.shared
    except psutil.Error:
        return 0


def plot(memory: Sequence[tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3), layout='constrained')
    axes.plot(*zip(*memory, strict=True), linewidth=1)
    axes.set(xlabel='seconds', ylabel='GiB', ylim=(0, None), title='memory of all processes')
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
