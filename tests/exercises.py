"What every exercise's check is asked: right answers pass, wrong ones are named, a stub is no error."
import pytest


def cases(table):
    "A case for each entry of {exercise: [entry, ...]}."
    return [pytest.param(name, x, id=f"{name}-{i}") for name, xs in table.items() for i, x in enumerate(xs)]


def asked_of(
    check, # the module
    right, # exercise -> answers that pass
    wrong, # exercise -> (answer, words that name the mistake)
    tables, # exercise -> the mistakes that its check knows
    stubs=(lambda *args: ..., None), # what an open exercise may look like
):
    "Tests by name, for `globals().update(...)` in a test module."
    @pytest.mark.parametrize("name, answer", cases(right))
    def test_right_answers_pass(name, answer, capsys):
        assert getattr(check, name)(answer) is True
        assert capsys.readouterr().out.startswith("right")

    @pytest.mark.parametrize("name, pair", cases(wrong))
    def test_wrong_answers_are_named(name, pair, capsys):
        answer, words = pair
        assert getattr(check, name)(answer) is False
        assert words in capsys.readouterr().out

    @pytest.mark.parametrize("name, mistake", cases(tables))
    def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, mistake, capsys):
        assert getattr(check, name)(mistake.answer) is False, mistake.message
        assert mistake.message in capsys.readouterr().out

    @pytest.mark.parametrize("name", right)
    @pytest.mark.parametrize("stub", stubs)
    def test_an_open_exercise_is_no_error(name, stub, capsys):
        assert getattr(check, name)(stub) is None and capsys.readouterr().out == "not answered yet\n"

    return {name: test for name, test in locals().items() if name.startswith("test_")}
