"""A model of the latency of all networks of a space on a device, fitted to about 40 measured ones.

Latency is modelled as a sum: every part of a network adds its own, independent of the others. A
look-up table of operators would have the same entries. Here they are fitted to whole networks, so
they hold for any runtime, whatever operators it fuses.
"""

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from scipy.optimize import nnls
from scipy.stats import kendalltau

from backbones.benchmark.benchmark import describe_machine
from backbones.benchmark.candidates import drop_weights
from backbones.benchmark.report import format_rows
from backbones.benchmark.work import Setting
from backbones.efficientformer_v2.backbone import NUM_STAGES
from backbones.errors import ConfigError
from backbones.files import write_text

from .space import Choice, Space

# Mean relative errors above which there is a warning, and latency is not used in a search.
HIGH_ERROR = 0.08
MAX_ERROR = 0.15
MIN_NETWORKS = 10
NUM_FOLDS = 5
# On some devices, kernels process 16 channels at once.
PADDINGS = (1, 16)
ELSEWHERE = 'csv'


@dataclass(frozen=True)
class LatencyModel:
    """A model of the latency of the networks of a space on a device."""

    space: Space
    setting: Setting | None  # what was measured; None if it was measured elsewhere
    padding: int  # numbers of channels are rounded up to a multiple of this
    coefficients: dict[str, float] = field(repr=False)  # ms for each unit of terms_of()
    error: float  # mean relative error in cross-validation
    tau: float  # Kendall's rank correlation of predicted and measured latency in cross-validation

    def predict(self, choice: Choice) -> float:
        """Return the predicted milliseconds for one image."""
        terms = terms_of(self.space, choice, self.padding)
        return sum(self.coefficients[name] * value for name, value in terms.items())

    @property
    def source(self) -> str:
        """The backend and image size of the measurements."""
        if self.setting is None:
            return 'measurements.csv'
        return '{} at {}x{}'.format(self.setting.backend, *self.setting.size)

    def save(self, path: Path, config: Config, measured: dict[Choice, float]) -> None:
        """Write the model as JSON, with the measured networks and the machine."""
        setting = self.setting
        values = dict(
            machine=setting and describe_machine(setting.device, setting.threads, None),
            setting=setting and asdict(setting),
            error=self.error,
            tau=self.tau,
            padding=self.padding,
            coefficients=self.coefficients,
            networks=[dict(choice=asdict(choice), ms=ms) for choice, ms in measured.items()],
            **identify(config),
        )
        write_text(path, json.dumps(values, indent=2))

    @classmethod
    def load(cls, path: Path, config: Config) -> 'LatencyModel':
        """Read what :meth:`save` wrote; raise ConfigError if it is of another space or model."""
        values = json.loads(path.read_text())
        check_identity(path, values, config, 'run `search.py latency` again')
        setting = values['setting'] and Setting(**values['setting'])
        if setting:
            setting = replace(setting, size=tuple(setting.size))
        fitted = (values[key] for key in ('padding', 'coefficients', 'error', 'tau'))
        return cls(Space.from_config(config), setting, *fitted)


def identify(config: Config) -> dict[str, str]:
    """Return what latencies depend on: the space and the model's config, without its weights."""
    model = copy.deepcopy(config.model)
    drop_weights(model)
    content = json.dumps([model, config.get('classes')], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return dict(space=Space.from_config(config).to_json(), model=digest)


def check_identity(path: Path, values: dict[str, Any], config: Config, advice: str) -> None:
    """Raise ConfigError if values from a file are not of a config's networks."""
    if {key: values.get(key) for key in ('space', 'model')} != identify(config):
        raise ConfigError(
            f'{path} is of other networks than those of the config: its model or `search` has '
            f'changed. To use the new ones, {advice}'
        )


def latency_path(work_dir: str | Path, backend: str) -> Path:
    """Return the path of a backend's latency model; ``ELSEWHERE`` is that of measurements.csv."""
    return Path(work_dir) / f'latency_{backend}.json'


def find_latency(config: Config, backend: str | None = None) -> LatencyModel:
    """Return a backend's latency model in the work folder, or the only one; else ConfigError."""
    work_dir = config.work_dir
    found = sorted(Path(work_dir).glob(latency_path('', backend or '*').name))
    if len(found) == 1:
        return LatencyModel.load(found[0], config)
    if found:
        names = ', '.join(path.stem.removeprefix('latency_') for path in found)
        raise ConfigError(f'{work_dir} has latencies of {names}: choose one with --backend')
    options = {None: '', ELSEWHERE: ' --from DIR/measurements.csv'}
    command = f'search.py latency CONFIG{options.get(backend, f" --backend {backend}")}'
    path = latency_path(work_dir, backend or '*')
    raise ConfigError(f'there is no {path}: run `{command}` first')


def terms_of(space: Space, choice: Choice, padding: int = 1) -> dict[str, float]:
    """Return the terms, by name, whose weighted sum is a network's latency.

    The numbers of pixels are the same in all networks, so they are part of the weights.
    """
    widths = {name: math.ceil(n / padding) * padding for name, n in space.widths(choice).items()}
    stages = [widths[f'stages.{stage}'] for stage in range(NUM_STAGES)]
    terms = {'constant': 1, 'stem': widths['stem'] * stages[0]}
    for stage, channels in enumerate(stages):
        name = f'stage {stage + 1}'
        if stage > 0:
            terms[f'{name}: downsampling'] = stages[stage - 1] * channels
        hidden = [widths[f'stages.{stage}.blocks.{block}'] for block in choice.blocks(stage)]
        terms[f'{name}: blocks'] = len(hidden)
        terms[f'{name}: hidden channels'] = sum(hidden)
        terms[f'{name}: hidden channels x channels'] = sum(hidden) * channels
        if stage >= 2:
            number = choice.num_attention_blocks[stage - 2]
            terms[f'{name}: attention blocks'] = number
            terms[f'{name}: attention blocks x channels'] = number * channels
    neck = widths.get('neck', 1)
    # Not every neck reads the first stage.
    terms['neck: reading stage 1'] = neck * stages[0]
    terms['neck: reading the others'] = neck * sum(n / 4**i for i, n in enumerate(stages) if i)
    if 'neck' in widths:
        terms['neck and head: channels'] = neck
        terms['neck and head: channels squared'] = neck**2
    return terms


def fit(
    space: Space,
    choices: Sequence[Choice],
    latencies: Sequence[float],
    setting: Setting | None = None,
) -> LatencyModel:
    """Fit a latency model to networks of a space and their milliseconds."""
    check_number(len(choices))
    target = np.array(latencies)
    models = []
    for padding in PADDINGS:
        terms = [terms_of(space, choice, padding) for choice in choices]
        rows = np.array([list(each.values()) for each in terms], float)
        error, tau = compare(cross_validate(rows, target), target)
        coefficients = dict(zip(terms[0], solve(rows, target).tolist(), strict=True))
        models.append(LatencyModel(space, setting, padding, coefficients, error, tau))
    return min(models, key=lambda model: model.error)


def check_number(number: int) -> None:
    """Raise ConfigError for fewer networks than a fit needs."""
    if number < MIN_NETWORKS:
        raise ConfigError(
            f'a latency model needs at least {MIN_NETWORKS} networks, better 25 or more, not '
            f'{number}'
        )


def solve(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the weights, none below 0, with the least squares of relative errors."""
    scale = np.maximum(rows.max(axis=0), 1)
    weights, _ = nnls(rows / scale / target[:, None], np.ones(len(target)))
    return weights / scale


def cross_validate(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Predict each network's latency from the folds without it."""
    folds = np.random.default_rng(0).permutation(len(target)) % NUM_FOLDS
    predicted = np.empty(len(target))
    for fold in range(NUM_FOLDS):
        own = folds == fold
        predicted[own] = rows[own] @ solve(rows[~own], target[~own])
    return predicted


def compare(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return the mean relative error and Kendall's tau."""
    error = np.mean(np.abs(np.divide(predicted, measured) - 1))
    return float(error), float(kendalltau(predicted, measured).statistic)


def format_latency(model: LatencyModel, measured: dict[Choice, float]) -> str:
    """Return a table of some networks and the errors of the model that was fitted to them."""
    names = {choice: name for name, choice in model.space.published().items()}
    names |= {model.space.smallest: 'smallest', model.space.largest: 'largest'}
    rows = [('network', 'predicted', 'measured')]
    for choice in sorted(names.keys() & measured.keys(), key=measured.get):
        both = (model.predict(choice), measured[choice])
        rows.append((names[choice], *(f'{ms:.2f} ms' for ms in both)))
    lines = [
        format_rows(rows),
        f'\n{model.source}, fitted to {len(measured)} networks; on networks that a fit has not '
        f'seen, in {NUM_FOLDS}-fold cross-validation: error {model.error:.1%}, '
        f"Kendall's tau {model.tau:.3f}",
    ]
    if model.error > HIGH_ERROR:
        lines.append(
            f'warning: an error above {HIGH_ERROR:.0%} is high, and above {MAX_ERROR:.0%} '
            '`search.py find` refuses to search by latency: measure on an idle machine, for '
            'longer (--seconds), or more networks (--networks)'
        )
    return '\n'.join(lines)
