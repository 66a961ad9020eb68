from pathlib import Path

import pytest
import yaml

from fap.config import Config, load_config, make_config

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.momentum=1", "optim.momentum = 1"),
        ("method.padv=0.2", "did you mean 'p_adv'"),
        ("metod.p_adv=0.2", "did you mean 'method'"),
        ("method.p_adv=0", "(0, 1)"),
        ("method.p_adv=1", "(0, 1)"),
        ("method.p_adv=0.3", "13/45"),
        ("method.p_adv=1/0", "fraction"),
        ("method.attack_steps=2", "recycles one gradient"),
        ("method.attack_steps=0", "method.attack_steps = 0"),
        ("method.targeted=true", "no meaning"),
        ("method.attack_bn=running", "no meaning"),
        ("method.name=fgsm", "method.name = 'fgsm'"),
        ("run.norm_kernel=split", "run.norm_kernel = 'split': Input should be 'auto', 'triton' or 'framework'"),
        ("optim.clean_batch=100", "multiple of method.group"),
        ("data.resize=100", "data.resize"),
        ("data.scale=[1,0.1]", "data.scale"),
        ("model=3", "model = 3"),
        ("model.name.x=3", "model.name = {'x': 3}"),
        ("seed", "key=value"),
        ("seed=[", "not a YAML value"),
    ],
)
def test_users_mistakes_name_field_value_and_remedy(override: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert says in str(error.value)


def test_combinations_without_meaning_are_refused() -> None:
    for overrides, says in (
        (["method.combine=mean", "method.sync=true"], "Algorithm 1"),
        (["method.name=vanilla", "method.eps_255=1"], "no meaning"),
        (["method.name=advprop", "method.p_adv=1/5"], "no meaning"),
        (["method.name=decoupled", "method.schedule=fused"], "no meaning"),
        (["method.name=advprop", "data.mix=mixup"], "unmixed"),
        (["run.compile=true", "run.norm_kernel=triton"], "run.norm_kernel = 'triton' with run.compile = true"),
    ):
        with pytest.raises(ValueError, match=says):
            load_config(None, overrides)


def test_numbers_and_words_that_yaml_misreads(tmp_path: Path) -> None:
    file = tmp_path / "my_run.yaml"
    file.write_text("optim: {weight_decay: 1e-4, lr: '2e-1'}\nmethod: {p_adv: 1/9, shuffle: off}\nrun: {graph: on}\n")
    config = load_config(file, ["seed=3"])
    assert config.optim.weight_decay == 1e-4
    assert config.optim.lr == 0.2
    assert config.method.adv_group == 8
    assert config.method.shuffle == "off"
    assert config.run.graph == "on"
    assert (config.name, config.seed) == ("my_run", 3)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        load_config(file)
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_shipped_configs_are_complete_and_survive_a_round_trip(file: Path) -> None:
    config = load_config(file)
    assert make_config(yaml.safe_load(config.to_yaml())) == config
    given = yaml.safe_load(file.read_text())
    machine = {"train", "val", "pipeline", "threads", "prefetch", "hw_decoder_load", "init"}
    for section in ("model", "method", "data", "optim", "budget"):
        values = getattr(config, section)
        expected = {k for k in type(values).model_fields if k not in machine}
        if section == "method":
            expected = {k for k in expected if getattr(values, k) is not None}
        assert set(given[section]) == expected
    assert file.read_text().startswith("# ")


def test_an_unset_field_means_the_paper() -> None:
    method = Config().method
    assert (method.name, method.schedule, method.combine, method.shuffle) == ("fast_advprop", "fused", "sum", "ranks")
    assert (method.eps_255, method.step_size_255, method.weight_noise, method.weight_adv, method.sync) == (1, 1, 0.5, 0.5, True)
    assert (method.group, method.adv_group) == (64, 16)
    assert make_config({"method": {"name": "advprop"}}).method.step_size_255 == 1
    assert make_config({"method": {"name": "advprop", "attack_steps": 1}}).method.step_size_255 == 4
