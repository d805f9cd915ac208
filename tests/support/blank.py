"""Tables are blanked for the tests of plots and pages."""


def blanked(frame, value):
    """`frame` with `value` in place of every number that was measured."""
    named = {"layer", "layers", "token_index", "rank", "budget", "n_prompts", "parameters"}
    measured = [column for column in frame.select_dtypes("number") if column not in named]
    return frame.assign(**dict.fromkeys(measured, value))
