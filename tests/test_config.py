"""Configs: what is read, what is refused, and that what is recorded reads back."""

from pathlib import Path

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src import config
from src.config import Refused
from src.training_loop import configure

MINIMAL = """
training_loop.data = @digits
training_loop.model = @SimpleCNN
training_loop.optimizer = @SGD
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes gin files into the current folder and gives their names back."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "a.gin") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        return name

    return write_file


def checked(*configs: str, b: tuple[str, ...] = ()) -> config.Config:
    return configure(config.read(configs, b))


# --- reading

REFUSED_BY_TEXT = {
    "a.gin:2: Unable to parse value": "a.x = 1\nb.y = ?",
    "a.gin:1: the macro %lr has no value": "SGD.lr = %lr",
    "(did you mean rate?)": "SGD.lr = %rates\nrate = 0.1",
    "a.gin:1: maximum recursion depth": "a = %b\nb = %a\nSGD.lr = %a",
    "a.gin:2: no.gin: no such config": "a.x = 1\ninclude 'no.gin'",
    "a.gin: includes itself": "include 'a.gin'",
    "a.gin: is empty": "# nothing\n\n",
    "an unclosed bracket or quote?": "a.x = [1,\n2",
}


@pytest.mark.parametrize("message", REFUSED_BY_TEXT)
def test_a_bad_file_is_refused_with_its_line(write, message):
    with pytest.raises(Refused) as refusal:
        config.read([write(REFUSED_BY_TEXT[message])])
    assert message in refusal.value.message


def test_a_missing_config_names_the_nearest(write):
    write("a.x = 1", "configs/cnn.gin")
    with pytest.raises(Refused, match=r"no such config.*did you mean configs/cnn.gin"):
        config.read(["configs/cn.gin"])
    with pytest.raises(Refused, match=r"no such config.*did you mean configs/cnn.gin"):
        config.read(["config/cnn.gin"])
    with pytest.raises(Refused, match=r"results/a: no such config \(RUN_DIR comes first\)"):
        config.read(["results/a"])
    with pytest.raises(Refused, match="configs: Is a directory"):
        config.read(["configs"])
    Path("binary.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match=r"binary\.gin: .*can't decode"):
        config.read(["binary.gin"])


@pytest.mark.parametrize("text", ["a.x='", "a.x=[1", "a.x=1)", "a.x=\"b'", "a.x={'b': (1}"])
def test_an_open_quote_or_bracket_in_a_binding_is_refused(text):
    with pytest.raises(Refused, match="unclosed"):
        config.read([], [text])


def test_bindings_are_split_outside_quotes_brackets_and_comments():
    text = " a.x=';' # it's; not split\n  b.y=[1,\n2]; c.z='''\n;''';;\n d.w=\\\n3"
    found = {key: value for key, (value, _) in config.read([], [text]).bindings.items()}
    assert found == {"a.x": ";", "b.y": [1, 2], "c.z": "\n;", "d.w": 3}
    assert config.read([], ["", " ;"]).bindings == {}


def test_a_binding_must_have_a_value():
    with pytest.raises(Refused, match=r"-b 'SGD\.lr': "):
        config.read([], ["SGD.lr"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda items: (
        st.lists(items, max_size=3)
        | st.lists(items, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), items, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(values, min_size=1, max_size=4), st.sampled_from([";", "\n", " ; ", ";;\n"]))
def test_any_value_survives_binding_splitting(items, separator):
    text = separator.join(f"a.x{i} = {v!r}" for i, v in enumerate(items))
    read = [value for value, _ in config.read([], [text]).bindings.values()]
    assert read == items
    assert [repr(value) for value in read] == [repr(v) for v in items]  # True is not 1, () not []


@given(st.text(alphabet="ab.@%='\"()[]{};\n\\# 1,$", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        config.read([], [text])
    except Refused as refusal:
        assert "-b" in refusal.message


def test_layers_includes_and_macros(write):
    write("SGD.lr = %rate\nrate = 0.1", "base/b.gin")
    write("include 'b.gin'\nSGD.momentum = 0.9", "base/a.gin")
    write("SGD.momentum = 0.5", "later.gin")
    settings = config.read(["base/a.gin", "later.gin"], ["rate=0.3;SGD.nesterov=True"])
    values = {key: value for key, (value, _) in settings.bindings.items()}
    assert values == {"SGD.lr": 0.3, "SGD.momentum": 0.5, "SGD.nesterov": True}
    assert [f.name for f in settings.files] == ["a.gin", "b.gin", "later.gin"]
    assert settings.last("SGD.momentum", None) == 0.5


# --- checking

REFUSED_BY_NAME = {
    "a.gin:5: nothing is named SimpleCN (did you mean SimpleCNN?)": "SimpleCN.n_dense = 3",
    "a.gin:5: nothing is named SDG (did you mean SGD?)": "training_loop.optimizer = @SDG",
    "SimpleCNN has no parameter n_filter (did you mean n_filters?)": "SimpleCNN.n_filter = [1]",
    "SGD has no parameter learning_rate: there are lr, momentum": "SGD.learning_rate = 0.1",
    "SimpleCNN.n_classes is given by the code": "SimpleCNN.n_classes = 3",
    "SGD.params is given by the code": "SGD.params = []",
    "a.gin:5: training_loop.n_epochs = '5', but it must be int": "training_loop.n_epochs = '5'",
    "training_loop.n_epochs = True, but it must be int": "training_loop.n_epochs = True",
    "training_loop.n_epochs = 2.0, but it must be int": "training_loop.n_epochs = 2.0",
    "SGD.lr = inf, but it must be": "SGD.lr = 1e999",
    "nothing is named SGD() (did you mean SGD?)": "training_loop.optimizer = @SGD()",
    "nothing is named optim.SGD": "training_loop.optimizer = @optim.SGD",
    "training_loop.n_epochs = @SGD, but it must be int": "training_loop.n_epochs = @SGD",
    "training_loop.model = 'MLP', but it must be @Module": "training_loop.model = 'MLP'",
    "callbacks = @LRSchedule, but it must be list[@Callback]": "training_loop.callbacks = @LRSchedule",
    "training_loop.monitor_mode = 'best'": "training_loop.monitor_mode = 'best'",
    "SimpleCNN.n_filters = [8, '16'], but it must be": "SimpleCNN.n_filters = [8, '16']",
    "WarmupCosine.total_steps has no value": "training_loop.callbacks = [@WarmupCosine]",
    "torchvision.models has no": "training_loop.model = @torchvision.models.mobilnet_v3_small",
    "torchmetrics has no metric F1Scor (did you mean F1Score?)": ("training_loop.metrics = [@torchmetrics.F1Scor]"),
    "poutyne has no callback Early": "training_loop.callbacks = [@poutyne.Early]",
    "StepLR has no parameter step (did you mean step_size?)": "StepLR.step = 1",
    "a.gin:5: No module named 'no_such_module'": "import no_such_module",
    "nothing is named Unheard: it needs @gin.register, and its module an import": "training_loop.model = @Unheard",
}


@pytest.mark.parametrize("message", REFUSED_BY_NAME)
def test_a_wrong_name_or_type_is_refused_with_its_line(write, message):
    with pytest.raises(Refused) as refusal:
        checked(write(MINIMAL + REFUSED_BY_NAME[message]))
    assert message in refusal.value.message
    assert "WarmupCosine" in message or "a.gin:5" in refusal.value.message


def test_an_imported_module_that_is_no_python_is_named(write, monkeypatch):
    write("def f(:\n", "is_no_python.py")
    monkeypatch.syspath_prepend(".")
    with pytest.raises(Refused, match=r"a\.gin:5: invalid syntax \(is_no_python.py, line 1\)"):
        checked(write(MINIMAL + "import is_no_python"))


def test_what_has_no_value_is_named(write):
    with pytest.raises(Refused, match=r"training_loop\.model has no value"):
        checked(write("training_loop.data = @digits\ntraining_loop.optimizer = @SGD"))


def test_an_unused_binding_is_an_error_when_typed_and_a_warning_in_a_file(write):
    name = write(MINIMAL + "MLP.dropout = 0.1\nunused = 3\nMLP.n_hidden = (8,)\n")
    unused = {"a.gin:5": "MLP.dropout, MLP.n_hidden", "a.gin:6": "unused"}
    assert checked(name).warnings == [f"{where}: nothing uses {keys} in this config" for where, keys in unused.items()]
    for typed in ("MLP.dropout=0.2", "other=1", "big/SimpleCNN.n_dense=7"):
        with pytest.raises(Refused, match="nothing uses"):
            checked(name, b=(typed,))


def test_defaults_scopes_and_all_members_of_first_available_count_as_used(write):
    name = write(
        """
        training_loop.data = @first_available
        first_available.of = [@cifar10, @few/digits]
        few/digits.n_train = 100
        cifar10.n_train = 200
        CrossEntropyLoss.label_smoothing = 0.1
        training_loop.model = @SimpleCNN
        training_loop.optimizer = @SGD
        """.replace("        ", "")
    )
    found = checked(name)
    assert found.warnings == []
    flat = found.flat()
    assert flat["few/digits.n_train"] == "100"
    assert flat["training_loop.loss"] == "@CrossEntropyLoss"
    assert flat["training_loop.n_epochs"] == "1"
    assert "SimpleCNN.n_classes" not in flat
    chosen = found.choose("data", 1).flat()
    assert chosen["training_loop.data"] == "@few/digits"
    assert not any(key.startswith(("cifar10", "first_available")) for key in chosen)


def test_first_availables_choice_stays_in_its_scope(write):
    name = write(MINIMAL + "training_loop.data = @few/first_available\nfew/digits.n_train = 100\n")
    chosen = checked(name, b=("first_available.of=[@cifar10, @digits]",)).choose("data", 1).flat()
    assert chosen["training_loop.data"] == "@few/digits" and chosen["few/digits.n_train"] == "100"


def test_first_availables_choice_is_not_that_of_a_data_set_made_from_it(write, monkeypatch):
    write("import gin\n@gin.register\ndef half(of: object):\n    return of()\n", "halves.py")
    monkeypatch.syspath_prepend(".")
    made = "import halves\ntraining_loop.data = @half\nhalf.of = @first_available\nfirst_available.of = [@digits]\n"
    found = checked(write(MINIMAL + made))
    assert found.choose("data", 0) == found


def test_a_setting_can_be_replaced(write):
    found = checked(write(MINIMAL + "training_loop.callbacks = [@a/EarlyStopping]\na/EarlyStopping.patience = 3\n"))
    changed = found.set("training_loop.n_epochs", 5).set("a/EarlyStopping.patience", 4)
    assert changed.text() == checked(write(changed.text(), "b.gin")).text()
    assert dict(changed.flat().items() - found.flat().items()) == {
        "training_loop.n_epochs": "5",
        "a/EarlyStopping.patience": "4",
    }
    without = found.set("training_loop.callbacks", [])
    assert not any("EarlyStopping" in key for key in without.flat())
    with pytest.raises(KeyError):
        without.set("a/EarlyStopping.patience", 4)
    with pytest.raises(KeyError):
        found.set("SGDD.lr", 1)


def test_what_is_recorded_reads_back_to_the_same_config(write):
    name = write(
        MINIMAL
        + "training_loop.callbacks = [@StepLR, @LRSchedule, @a/EarlyStopping]\n"
        + "StepLR.step_size = 2\nLRSchedule.base_lr = 0.1\na/EarlyStopping.patience = 3\n"
        + "training_loop.metrics = [@Accuracy, @top3/torchmetrics.Accuracy]\n"
        + "torchmetrics.Accuracy.task = 'multiclass'\ntop3/torchmetrics.Accuracy.top_k = 3\n"
    )
    first = checked(name)
    second = checked(write(first.text(), "b.gin"))
    assert first.warnings == second.warnings == []
    assert second.text() == first.text()
    assert second.values == first.values


def test_bare_names_are_ours_and_torchs_even_when_a_library_has_them_too(write):
    name = write(
        MINIMAL
        + "training_loop.callbacks = [@poutyne.EarlyStopping, @EarlyStopping]\n"
        + "EarlyStopping.patience = 3\npoutyne.EarlyStopping.patience = 7\n"
    )
    flat = checked(name).flat()
    assert flat["EarlyStopping.patience"] == "3"
    assert flat["poutyne.EarlyStopping.patience"] == "7"


def test_gin_builds_what_was_checked(write):
    found = checked(write(MINIMAL + "SimpleCNN.n_dense = 7\nbig/SimpleCNN.n_dense = 9"), b=())
    found.apply()
    settings = gin.get_bindings("training_loop")
    network = settings["model"](input_shape=(1, 8, 8), n_classes=3)
    assert any(getattr(m, "out_features", None) == 7 for m in network.modules())
    assert settings["n_epochs"] == 1
