"""ListOps against a stack machine that knows nothing of trees."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import InputError
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.listops import OPERATORS, ListOps, Operation, parse

DIGITS = st.integers(0, 9)
TREES = st.recursive(
    st.builds(Operation, st.sampled_from(list(OPERATORS)), st.lists(DIGITS, min_size=1).map(tuple)),
    lambda trees: st.builds(
        Operation,
        st.sampled_from(list(OPERATORS)),
        st.lists(st.one_of(DIGITS, trees), min_size=1, max_size=5).map(tuple),
    ),
    max_leaves=12,
)
SPLITS = ("train", "validation", "test")


def machine(text):
    """Push words; at a closing bracket pop down to the operator and push the result."""
    stack = []
    for word in text.split():
        if word != "]":
            stack.append(word)
            continue
        taken = []
        while not stack[-1].startswith("["):
            taken.append(int(stack.pop()))
        stack.append(str(RULES[stack.pop()](sorted(taken))))
    (value,) = stack
    return int(value)


def lower_middle(values):
    """The median of sorted values: the mean of the middle two where there is no one, floored."""
    n = len(values)
    return math.floor((values[(n - 1) // 2] + values[n // 2]) / 2)


RULES = {
    "[MAX": lambda values: values[-1],
    "[MIN": lambda values: values[0],
    "[MED": lower_middle,
    "[SM": lambda values: int(str(sum(values))[-1]),
}


def depth(tree):
    return 1 + max((depth(a) for a in tree.arguments if isinstance(a, Operation)), default=0)


def operations(tree):
    yield tree
    for argument in tree.arguments:
        if isinstance(argument, Operation):
            yield from operations(argument)


@given(TREES)
def test_a_tree_is_read_from_its_text_and_worth_what_the_machine_says(tree):
    assert parse(str(tree)) == tree
    assert tree.value == machine(str(tree))


@given(TREES)
def test_steps_are_all_operations_on_digits_and_the_last_is_the_answer(tree):
    assert len(tree.steps) == len(list(operations(tree)))
    assert all(machine(flat) == value and flat.count("[") == 1 for flat, value in tree.steps)
    assert tree.steps[-1][1] == machine(str(tree))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),  # Nangia and Bowman's own
        ("[MED 1 5 [MAX 3 9 ] ]", 5),
        ("[MED 1 5 [MAX 3 9 ] 2 ]", 3),  # 3.5 rounded down
        ("[MED 0 1 ]", 0),
        ("[MED 9 0 8 ]", 8),  # of the values, wherever they stand
        ("[SM 9 9 [SM 5 6 ] ]", 9),
        ("[SM 5 5 ]", 0),
        ("[MIN 3 [MAX 2 8 ] 7 ]", 3),
    ],
)
def test_worked_by_hand(text, value):
    assert parse(text).value == value


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_is_in_two_splits(seed):
    """Not even where expressions are so short that splits would else share most of them."""
    task = ListOps(max_depth=1, max_args=2)
    prompts = [{e.prompt for e in task.examples(split, 30, seed)} for split in SPLITS]
    assert [len(found) for found in prompts] == [30, 30, 30]
    assert len(set.union(*prompts)) == 90
    other = {e.prompt for e in task.examples("test", 30, seed + 1)}
    assert not other & (prompts[0] | prompts[1])  # whatever the seeds


def test_a_seed_says_which_examples():
    task = ListOps()
    for split in SPLITS:
        assert task.examples(split, 50, 1) == task.examples(split, 50, 1)
        assert task.examples(split, 50, 1) != task.examples(split, 50, 2)
        assert task.examples(split, 50, 1)[:20] == task.examples(split, 20, 1)


@pytest.mark.parametrize("worked", [False, True])
def test_responses_end_in_the_answer_and_are_right(worked):
    task = ListOps(max_depth=3, worked=worked, prompt="{expression} =")
    for example in task.examples("validation", 200):
        assert int(example.answer) == machine(example.prompt.removesuffix(" ="))
        assert example.response.split()[-1] == example.answer
        assert task.extract(example.response) == example.answer
        assert task.correct(example.response, example)
        assert len(example.response.split()) <= task.new_tokens
        assert worked or example.response == example.answer


def test_operators_depth_and_arguments_are_respected():
    task = ListOps(("MIN", "SM"), max_depth=3, max_args=3, prompt="{expression}")
    trees = [parse(example.prompt) for example in task.examples("train", 300)]
    found = [operation for tree in trees for operation in operations(tree)]
    assert {operation.operator for operation in found} == {"MIN", "SM"}
    assert {len(operation.arguments) for operation in found} == {2, 3}
    assert {depth(tree) for tree in trees} == {1, 2, 3}


def test_one_argument_in_four_is_a_digit_above_the_last_level():
    """Counted over the roots' arguments: a binomial within four standard deviations."""
    task = ListOps(max_depth=2, max_args=4, prompt="{expression}", digits=0.25)
    # Roots of digits alone are few and come again, so that unique examples hold fewer of them.
    trees = [parse(e.prompt) for e in task.examples("train", 2000)]
    full = [tree for tree in trees if len(tree.arguments) == 4]
    share = sum(isinstance(a, int) for tree in full for a in tree.arguments) / (4 * len(full))
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / (4 * len(full))) ** 0.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("7.", "7"),
        ("The answer is 7.", "7"),
        ("[MIN 4 7 ] 4 [MAX 2 9 4 0 ] 9", "9"),
        ("[MAX 2 9 ] = 9", "9"),
        ("first 3, then 4", "4"),
        ("[MIN 4 7 ] 4 [MAX 2 9 4 0 ]", None),  # broken off before the value
        ("[MIN 4 7 ] 4 [MAX 2 9 4 0 ].", None),
        ("[MIN 4 7 ] 4 [MAX 2 9", None),  # broken off inside
        ("12", None),
        ("3.5", None),
        ("-3", None),
        ("x7", None),
        ("", None),
    ],
)
def test_the_answer_is_the_digit_behind_the_last_bracket(text, answer):
    assert ListOps(worked=True).extract(text) == answer


def test_more_examples_than_there_are_expressions_are_refused():
    """400 expressions of one operation on two digits: 1,000 cannot be drawn."""
    with pytest.raises(InputError, match="max_depth"):
        ListOps(max_depth=1, max_args=2).examples("train", 1000)


def test_names_of_tasks():
    assert make_task("listops").examples("test", 1)[0].response.isdigit()
    assert "[" in make_task("listops-worked").examples("test", 1)[0].response
    with pytest.raises(InputError, match=r"'chess'.*expected one of listops"):
        make_task("chess")
