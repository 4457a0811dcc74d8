"""Charts on the page."""

from backbones.report.blocks import Block
from backbones.report.charts import line_chart
from backbones.report.page import render


def test_names_are_escaped():
    chart = line_chart('<e>', {'<i>': [(0, 1), (1, float('nan'))]}, ('x', '<u>'))
    block = Block('<s>', columns=['<q>', '<q>'], rows=[['<q>', '<q>']], charts=[chart])
    page = render('<t>', {}, {}, [('Charts', [block])])
    for name in 'eiusqt':
        assert f'&lt;{name}&gt;' in page and f'<{name}>' not in page
    assert 'nan' not in page.partition('</style>')[2]
