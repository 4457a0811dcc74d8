"""The relative position bias, and attention in chunks."""

import pytest
import torch
import torch.nn.functional as F

from backbones import attention
from backbones.attention import (
    DownsamplingAttention,
    RelativePositionBias,
    TalkingHeadAttention,
    look_up_offsets,
    resize_table,
)

NORM = dict(type='BN')


def bias_with_random_table(table_size, query_stride=1, resize='offset') -> RelativePositionBias:
    bias = RelativePositionBias(8, table_size, query_stride, resize)
    torch.nn.init.normal_(bias.table)
    return bias.eval()


@pytest.mark.parametrize('query_stride', [1, 2])
@pytest.mark.parametrize('grid', [(1, 1), (3, 3), (2, 5), (7, 4)])
def test_look_up_is_by_distance(grid, query_stride):
    table = torch.randn(8, *grid)
    bias = look_up_offsets(table, query_stride)
    height, width = grid
    queries = [
        (y, x) for y in range(0, height, query_stride) for x in range(0, width, query_stride)
    ]
    keys = [(y, x) for y in range(height) for x in range(width)]
    assert bias.shape == (8, len(queries), len(keys))
    for i, (qy, qx) in enumerate(queries):
        for j, (ky, kx) in enumerate(keys):
            assert torch.equal(bias[:, i, j], table[:, abs(qy - ky), abs(qx - kx)])


def test_offset_is_exact_on_the_grid_of_the_table():
    bias = bias_with_random_table((4, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            bias((4, 6), torch.float32), look_up_offsets(bias.table, 1), rtol=0, atol=0
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
    expanded = look_up_offsets(bias.table, 1)[None]
    expected = F.interpolate(expanded, (15, 15), mode='bicubic', align_corners=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(bias((3, 5), torch.float32), expected)


@pytest.mark.parametrize('resize', ['offset', 'matrix'])
@pytest.mark.parametrize('query_stride', [1, 2])
def test_rows_are_rows_of_the_whole(resize, query_stride):
    bias = bias_with_random_table((4, 4), query_stride, resize)
    with torch.no_grad():
        whole = bias((5, 7), torch.float32)
        for rows in (slice(0, 3), slice(3, 9), slice(9, None)):
            torch.testing.assert_close(bias.rows((5, 7), torch.float32, rows), whole[:, rows])


@pytest.mark.parametrize('layer', ['talking_head', 'strided', 'downsampling'])
@pytest.mark.parametrize('budget', [1, 3000, 20_000])
def test_splitting_the_queries_changes_nothing(layer, budget, monkeypatch):
    torch.manual_seed(0)
    if layer == 'downsampling':
        module = DownsamplingAttention(16, 24, (4, 4), 'offset', NORM)
    else:
        stride = 2 if layer == 'strided' else 1
        module = TalkingHeadAttention(16, stride, (4, 4), 'offset', NORM)
    torch.nn.init.normal_(module.relative_position_bias.table)
    module.eval()
    x = torch.randn(2, 16, 9, 11)
    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr(attention, 'SCORE_BUDGET', budget)
        torch.testing.assert_close(module(x), expected)


def test_bias_is_kept_at_inference_and_made_anew_when_the_table_changes():
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


def test_bias_kept_in_inference_mode_does_not_leak_into_training():
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
    torch.nn.init.zeros_(module.talking_head2.weight)
    pixel = torch.randn(1, 8, 1, 5).expand(1, 8, 400, 5)
    scores = torch.zeros(8, 400, 400)

    def constant_part(tokens: int) -> torch.Tensor:
        v = pixel[:, :, :tokens]
        q = k = torch.zeros(1, 8, tokens, 32)
        return module.attend(q, k, v, scores[:, :tokens, :tokens])[0, :, 0]

    growth = (constant_part(400) / constant_part(16)).mean().item()
    assert growth == pytest.approx(1 if resize == 'offset' else 25)
    torch.testing.assert_close(constant_part(16), 16 * pixel[0, :, 0])


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
