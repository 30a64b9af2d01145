"""What the kernels and steps are to reach, by card, and whether a sitting's results reach it."""

from dataclasses import dataclass
from typing import Any

OURS = 'segment_attention, triton'


@dataclass(frozen=True)
class Card:
    """What a card was seen to do at best.

    Args:
        bandwidth: TB/s of a copy, bytes read and written.
        products: TFLOP/s of 8192 x 8192 in bfloat16, the least and the most.
        floors: Microseconds by (case, tokens, pass) of 50,176 tokens with 12 heads of 64.
    """
    bandwidth: float | None = None
    products: tuple[float, float] | None = None
    floors: dict[tuple[str, int, str], float] | None = None


FORWARD, BOTH = 'forward', 'forward+backward'
#: By what the name of the device holds. Of an H200 nothing was measured yet: its floors come from its own sitting.
CARDS = {
    'H100': Card(2.97, (720, 795), {
        ('randsac', 64, FORWARD): 105, ('randsac', 64, BOTH): 288, ('randsac', 196, FORWARD): 104,
        ('randsac', 196, BOTH): 311, ('randsac', 1024, FORWARD): 123, ('randsac', 1024, BOTH): 431,
        ('saim', 197, FORWARD): 105, ('saim', 197, BOTH): 315}),
    'H200': Card(),
}


@dataclass(frozen=True)
class Goal:
    """Attention, that is to take at most `most` times what it is compared with, from the same sitting.

    Args:
        what: In words.
        case, tokens, kind: The row of this package's attention.
        most: Times the reference.
        against: 'floor'; the start of a peer's name, its fastest layout; or another row's (case, tokens).
        microseconds: That the goal comes to, or what is to be beaten, by card.
    """
    what: str
    case: str
    tokens: int
    kind: str
    most: float
    against: str | tuple[str, int]
    microseconds: dict[str, float] | None = None


GOALS = (
    # There the backward's floor is of seven tensors: it need not read the output.
    Goal('64 tokens, of the floor', 'randsac', 64, BOTH, 1.05, 'floor', {'H100': 302}),
    Goal('65 tokens, of 64', 'saim', 65, BOTH, 1.3, ('randsac', 64)),
    Goal('196 tokens, of the floor', 'randsac', 196, BOTH, 1.7, 'floor', {'H100': 529}),
    Goal('196 tokens, of the floor, in the end', 'randsac', 196, BOTH, 1.5, 'floor', {'H100': 467}),
    Goal("SAIM's forward at 197, of cuDNN's causal attention", 'saim', 197, FORWARD, 1.0, 'SDPA cuDNN, causal',
         {'H100': 146}),
    Goal('1,024 tokens, of FlexAttention in its best layout', 'randsac', 1024, BOTH, 1 / 1.5, 'FlexAttention',
         {'H100': 1059}),
)

#: Images a second of captured steps to beat, by card, model and batch size: the first measurements, and the goal for
#: small images.
PACES = {
    'H100': {('randsac_vit_base', 64): 2178, ('randsac_vit_base', 256): 2454, ('saim_vit_base', 64): 1480,
             ('randsac_vit_tiny_patch4_32', 512): 60_000},
    'H200': {},
}
#: Part of the ceiling of matrix products that captured steps are to reach, by model and batch size, on any card.
FRACTIONS = {('randsac_vit_base', 256): 0.5, ('saim_vit_base', 256): 0.5}
#: Images a second of the pretraining run, likewise.
RUN_PACES = {'H100': 37_100}


def card_of(device: str) -> str | None:
    """The key of CARDS that a device's name holds."""
    return next((name for name in CARDS if name in device), None)


def judge(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was reached; `met` is None where it was not measured.

    Args:
        content: Of gpu.json.
    """
    card, parts = card_of(content['device']), content['parts']
    attention = parts.get('attention', {}).get('result', {}).get('rows', [])
    judged = [_judge_attention(goal, card, attention) for goal in GOALS]
    rows = {(r['model'], r['batch_size'], r['variant']): r for r in parts.get('steps', {}).get('rows', [])}
    for (model, batch), least in PACES.get(card, {}).items():
        got = rows.get((model, batch, 'captured'), {}).get('images_per_second')
        judged.append(_goal(f'{model}, batch {batch}, captured, images/s', got, least, at_least=True))
    judged += [_goal(f'{model}, batch {batch}, captured, of the ceiling of products',
                     rows.get((model, batch, 'captured'), {}).get('fraction_of_ceiling'), least, at_least=True)
               for (model, batch), least in FRACTIONS.items()]
    if card in RUN_PACES:
        got = parts.get('run', {}).get('images_per_second')
        judged.append(_goal('the pretraining run, images/s', got, RUN_PACES[card], at_least=True))
    equal = [row['equal'] for row in parts.get('equality', {}).get('rows', [])]
    judged.append({'goal': 'captured steps equal plain ones to the bit', 'wanted': True,
                   'reached': None if not equal or None in equal else all(equal),
                   'met': None if not equal or None in equal else all(equal)})
    return judged


def _judge_attention(goal: Goal, card: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def fastest(case: str, tokens: int, name: str) -> dict[str, Any]:
        found = [r for r in rows if (r['case'], r['tokens'], r['pass'], r['head_dim']) == (case, tokens, goal.kind, 64)
                 and r['name'].startswith(name) and 'median_us' in r]
        return min(found, key=lambda row: row['median_us'], default={})

    own = fastest(goal.case, goal.tokens, OURS)
    if goal.against == 'floor':
        reference = own.get('floor_us', 0)
    elif isinstance(goal.against, tuple):
        reference = fastest(*goal.against, OURS).get('median_us', 0)
    else:
        reference = fastest(goal.case, goal.tokens, goal.against).get('median_us', 0)
    ratio = own['median_us'] / reference if own and reference else None
    floors = (CARDS[card].floors if card else None) or {}
    return {**_goal(goal.what, ratio, goal.most), 'microseconds': own.get('median_us'),
            'floor': own.get('floor_us'), 'goal_microseconds_known': (goal.microseconds or {}).get(card),
            'floor_known': floors.get((goal.case, goal.tokens, goal.kind))}


def _goal(what: str, reached: float | None, wanted: float, at_least: bool = False) -> dict[str, Any]:
    met = None if reached is None else reached >= wanted if at_least else reached <= wanted
    return {'goal': what, 'wanted': round(wanted, 3), 'reached': reached and round(reached, 3), 'met': met}


def suspicion(content: dict[str, Any]) -> str | None:
    """Why this card's timings may not be its own, or None: copies or products slower by a tenth than it was seen to
    do."""
    card = CARDS.get(card_of(content['device'])) or Card()
    result = content['parts'].get('attention', {}).get('result', {})
    for what, key, known in (('copies', 'bandwidth_tb_s', card.bandwidth),
                             ('products', 'product_tflop_s', card.products and card.products[0])):
        if known and result.get(key) and result[key] < 0.9 * known:
            return (f'{what} ran at {result[key]} {"TB/s" if what == "copies" else "TFLOP/s"} where this card was seen '
                    f'to do {known}: something else may have been on it.')
    return None


def in_words(judged: list[dict[str, Any]]) -> str:
    """A line a goal."""
    def line(row: dict[str, Any]) -> str:
        state = {True: 'met', False: 'missed', None: 'not measured'}[row['met']]
        return f'  {state:13}{row["goal"]}: ' + (f'{row["reached"]}, ' if row['reached'] is not None else '') + (
            f'wanted {row["wanted"]}')
    return '\n'.join(line(row) for row in judged)
