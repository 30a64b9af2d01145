"""The one table of the scores that commands measure: what log lines, results.json and model cards hold."""

from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A score in percent: what a person calls it, and whether figures and the lines of a run show it. Logs, results and
    cards hold every one."""
    label: str
    headline: bool = True


#: By the name that log lines and results give it.
METRICS = {
    'top1': Metric('top-1'),
    'top5': Metric('top-5'),
    'knn': Metric('kNN'),
    'linear': Metric('linear'),
    'miou': Metric('mIoU'),
    'pixel_accuracy': Metric('pixel accuracy'),
    # COCO's, of boxes and masks; objects are small below 32 x 32 pixels and large above 96 x 96.
    **{f'{kind}_{name}': Metric(f'{kind} {label}', headline=name in ('ap', 'ap50'))
       for kind in ('box', 'mask')
       for name, label in {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75', 'ap_small': 'AP small', 'ap_medium': 'AP medium',
                           'ap_large': 'AP large'}.items()},
}


def scores(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that a log line holds."""
    return {name: round(result[name], 4) for name in (*METRICS, 'loss') if name in result}


def describe(result: dict[str, Any]) -> str:
    """An evaluation in words: its headline scores and how many images they are of."""
    return ', '.join(f'{metric.label} {result[key]:.2f} %' for key, metric in METRICS.items()
                     if metric.headline and key in result) + f' of {result["images"]:,} images'
