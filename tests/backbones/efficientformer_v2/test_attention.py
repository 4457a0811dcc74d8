"""The relative position bias, and attention in chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.efficientformer_v2 import attention, cpu, position_bias
from backbones.efficientformer_v2.attention import DownsamplingAttention, TalkingHeadAttention
from backbones.efficientformer_v2.position_bias import RelativePositionBias, look_up, resize_table

NORM = dict(type='BN')


def bias_with_random_table(table_size, query_stride=1, resize='offset') -> RelativePositionBias:
    bias = RelativePositionBias(8, table_size, query_stride, resize)
    torch.nn.init.normal_(bias.table)
    return bias.eval()


def by_key(bias: torch.Tensor) -> torch.Tensor:
    """(num_heads, queries, keys) in row-major order, of what has the keys from last to first."""
    return bias.flatten(3).flatten(1, 2).flip(2)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('query_stride', [1, 2])
@pytest.mark.parametrize('grid', [(1, 1), (3, 3), (2, 5), (7, 4)])
def test_look_up_is_by_distance(grid, query_stride, compiled, monkeypatch):
    monkeypatch.setattr(position_bias, 'is_compiling', lambda: compiled)
    table = torch.randn(8, *grid)
    bias = look_up(table, query_stride)
    height, width = grid
    queries = [
        (y, x) for y in range(0, height, query_stride) for x in range(0, width, query_stride)
    ]
    keys = [(y, x) for y in range(height) for x in range(width)]
    assert bias.shape[3:] == grid
    bias = by_key(bias)
    assert bias.shape == (8, len(queries), len(keys))
    for i, (qy, qx) in enumerate(queries):
        for j, (ky, kx) in enumerate(keys):
            assert torch.equal(bias[:, i, j], table[:, abs(qy - ky), abs(qx - kx)])


def test_looking_up_takes_no_memory():
    table = torch.randn(8, 20, 30)
    assert look_up(table, 1).untyped_storage().nbytes() < 5 * table.untyped_storage().nbytes()


def test_compiles_into_one_graph_for_a_gpu(monkeypatch):
    # Without CUDA there are shapes alone, and no indexing.
    monkeypatch.setattr(RelativePositionBias, '_look_up', lambda self, *_: self.table + 1)
    with FakeTensorMode(), torch.device('cuda'):
        bias = RelativePositionBias(8, (4, 6), 1, 'offset').eval()
    with torch.no_grad():
        found = torch.compile(bias, backend='eager', fullgraph=True)((4, 6), torch.float32)
    assert found.is_cuda and found.shape == bias.table.shape


def test_offset_is_exact_on_the_grid_of_the_table():
    bias = bias_with_random_table((4, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            bias((4, 6), torch.float32), look_up(bias.table, 1), rtol=0, atol=0
        )


@pytest.mark.parametrize('grid', [(9, 5), (14, 14), (3, 20)])
def test_offset_keeps_the_smallest_and_the_largest_offset(grid):
    table = torch.randn(8, 7, 7)
    resized = resize_table(table, grid)
    assert resized.shape == (8, *grid)
    for y in (0, -1):
        for x in (0, -1):
            torch.testing.assert_close(resized[:, y, x], table[:, y, x])


def test_matrix_resizes_the_expanded_matrix():
    bias = bias_with_random_table((4, 4), resize='matrix')
    expanded = by_key(look_up(bias.table, 1))[None]
    expected = F.interpolate(expanded, (15, 15), mode='bicubic', align_corners=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(by_key(bias((3, 5), torch.float32)), expected)


@pytest.fixture(params=[True, False], ids=['onednn', 'plain'])
def with_onednn(request, monkeypatch) -> bool:
    """Tests once each way of a CPU."""
    if request.param and not cpu.has_operators():
        pytest.skip('this torch or processor is without')
    monkeypatch.setattr(cpu, 'has_operators', lambda: request.param)
    return request.param


@pytest.mark.parametrize('resize', ['offset', 'matrix'])
def test_talking_heads_are_those_of_the_paper(resize, with_onednn):
    """softmax(W1 (q k + bias) + b1), then W2 and b2, on the grid of the table."""
    torch.manual_seed(0)
    module = TalkingHeadAttention(16, 1, (3, 4), resize, NORM).eval()
    torch.nn.init.normal_(module.relative_position_bias.table)
    for head in (module.talking_head1, module.talking_head2):
        torch.nn.init.normal_(head.bias)
    x = torch.randn(2, 16, 3, 4)
    with torch.no_grad():
        q, k, v = (
            conv(x).flatten(2).unflatten(1, (8, -1)).transpose(2, 3)
            for conv in (module.q, module.k, module.v)
        )
        bias = by_key(module.relative_position_bias((3, 4), torch.float32))
        scores = module.talking_head1(q @ k.transpose(2, 3) / 32**0.5 + bias)
        attended = module.talking_head2(scores.softmax(-1)) @ v
        attended = attended.transpose(2, 3).reshape(2, -1, 3, 4)
        expected = module.proj(F.gelu(attended + module.v_local(module.v(x))))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def attention_of(layer: str, bias_resize: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if layer == 'downsampling':
        module = DownsamplingAttention(16, 24, (4, 4), bias_resize, NORM)
    else:
        stride = 2 if layer == 'strided' else 1
        module = TalkingHeadAttention(16, stride, (4, 4), bias_resize, NORM)
        torch.nn.init.normal_(module.talking_head2.bias)
    torch.nn.init.normal_(module.relative_position_bias.table)
    return module.eval()


@pytest.mark.parametrize('bias_resize', ['offset', 'matrix'])
@pytest.mark.parametrize('layer', ['talking_head', 'strided', 'downsampling'])
@pytest.mark.parametrize('budget', [1, 3000, 20_000])
def test_splitting_the_queries_changes_nothing(
    layer, budget, bias_resize, with_onednn, monkeypatch
):
    module = attention_of(layer, bias_resize)
    x = torch.randn(2, 16, 9, 11)
    whole = module(x)
    assert whole.requires_grad
    parts = []
    monkeypatch.setattr(cpu, 'MIN_QUERIES', 1)
    if with_onednn:
        split = cpu.split_queries
        monkeypatch.setattr(cpu, 'split_queries', lambda *grid: parts.extend(split(*grid)) or parts)
        monkeypatch.setattr(cpu, 'SCORE_BUDGET_ONEDNN', budget)
    else:
        attend = module.attend
        module.attend = lambda q, *others: parts.append(q.shape[2]) or attend(q, *others)
        monkeypatch.setattr(attention, 'SCORE_BUDGET_CPU', budget)
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole)
    assert len(parts) > 1 or budget == 20_000


@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (25, 42), (50, 3), (7, 400)])
@pytest.mark.parametrize('most', [1, 32, 100, 10**6])
def test_every_query_is_in_one_part(grid, most, monkeypatch):
    monkeypatch.setattr(cpu, 'MIN_QUERIES', most)
    rows, columns = grid
    place = torch.arange(rows * columns).view(grid)
    seen = []
    for part in cpu.split_queries(rows, columns, 1, 10**9):
        queries = place[part.rows, part.columns].flatten().tolist()
        assert queries == list(range(rows * columns))[part.all]
        assert part.size == len(queries) <= most
        seen += queries
    assert seen == list(range(rows * columns))


def test_bias_is_cached_at_inference_until_the_table_changes():
    bias = bias_with_random_table((4, 4))
    with torch.no_grad():
        first = bias((5, 5), torch.float32)
        assert bias((5, 5), torch.float32) is first
        assert bias((5, 6), torch.float32).shape != first.shape

        bias.table.add_(1)
        torch.testing.assert_close(bias((5, 5), torch.float32), first + 1)

        # Moving averages write to `data`; they do it between eval() and train().
        bias.table.data.add_(1)
        bias.train().eval()
        torch.testing.assert_close(bias((5, 5), torch.float32), first + 2)

        bias.load_state_dict({'table': torch.zeros_like(bias.table)})
        assert not bias((5, 5), torch.float32).any()

        assert bias((5, 5), torch.bfloat16).dtype == torch.bfloat16
    assert bias((5, 5), torch.float32).requires_grad


def test_bias_cached_in_inference_mode_does_not_leak_into_training():
    bias = bias_with_random_table((4, 4))
    with torch.inference_mode():
        bias((5, 5), torch.float32)
    bias((5, 5), torch.float32).sum().backward()
    assert bias.table.grad is not None


@pytest.mark.parametrize('resize', ['offset', 'matrix'])
def test_constant_part_does_not_grow_with_the_grid(resize):
    """The bias of the second talking head weighs every value, however many there are."""
    torch.manual_seed(0)
    module = TalkingHeadAttention(16, 1, (4, 4), resize, NORM).eval()
    torch.nn.init.ones_(module.talking_head2.bias)
    pixel = torch.randn(1, 1024, 1, 1)

    def constant_part(side: int) -> torch.Tensor:
        return module.constant_part(pixel.expand(-1, -1, side, side))

    growth = (constant_part(20) / constant_part(4)).mean().item()
    assert growth == pytest.approx(1 if resize == 'offset' else 25)
    torch.testing.assert_close(constant_part(4), 16 * pixel)


def test_constant_part_survives_a_resized_table():
    torch.manual_seed(0)
    small = TalkingHeadAttention(16, 1, (4, 4), 'offset', NORM).eval()
    large = TalkingHeadAttention(16, 1, (10, 10), 'offset', NORM).eval()
    torch.nn.init.normal_(small.talking_head2.bias)
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 16, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x))


def test_table_of_another_grid_is_resized_on_loading():
    small, large = bias_with_random_table((7, 7)), bias_with_random_table((25, 25))
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.table, resize_table(small.table, (25, 25)))
