"""tools/reproduce.py: what it plans, skips and runs; its commands are known to the tools that they name."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools import reproduce
from tools.reproduce import Step, Table
from transfer.config import InputError, torchvision_defaults
from transfer.convert import convert
from transfer.results import write_results


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def names(steps):
    return [step.done for step in steps]


TABLE = Table({"a": (Step("shared", "x {done}", 5), Step("{out}/{seed}/a/r", "y {seed} {gpus}", 2)),
               "b": (Step("shared", "x {done}", 5), Step("{out}/{seed}/b/r", "y {seed} {gpus}", 2)),
               "c": (Step("c.pkl", how="fetch it"), Step("{out}/{seed}/c/r", "z"))}, "report")


def test_plan_has_every_step_once_and_in_order(here):
    steps, missing = reproduce.plan(TABLE, ["a", "b"], 2, out="o", runs="p", gpus=3)
    assert names(steps) == ["shared", "o/0/a/r", "o/0/b/r", "o/1/a/r", "o/1/b/r"] and missing == steps
    assert [step.command for step in steps] == ["x shared", "y 0 3", "y 0 3", "y 1 3", "y 1 3"]


def test_folders_with_spaces_stay_one_word(here):
    steps, _ = reproduce.plan(reproduce.TABLES["table5"], ["rsa"], 1, out="my  runs", runs="my  runs/p", gpus=1,
                              options="", set="")
    assert "OUTPUT_DIR" in (words := shlex.split(steps[-1].command))
    assert words[words.index("OUTPUT_DIR") + 1] + "/results.json" == steps[-1].done == "my  runs/seed0/rsa/results.json"


def test_what_is_done_is_skipped_and_so_is_what_led_to_it(here):
    touch(here / "o" / "0" / "a" / "r")
    _, missing = reproduce.plan(TABLE, ["a"], 1, out="o", runs="p", gpus=1)
    assert missing == []  # "shared" is not there, but nobody needs it any more
    _, missing = reproduce.plan(TABLE, ["a", "b"], 1, out="o", runs="p", gpus=1)
    assert names(missing) == ["shared", "o/0/b/r"]
    touch(here / "shared")
    _, missing = reproduce.plan(TABLE, ["a", "b"], 2, out="o", runs="p", gpus=1)
    assert names(missing) == ["o/0/b/r", "o/1/a/r", "o/1/b/r"]


def test_rows_that_wait_for_the_user(here, capsys):
    assert reproduce.choose_rows(TABLE, None) == ["a", "b"]
    assert "left out: c needs c.pkl (fetch it)" in capsys.readouterr().out
    with pytest.raises(InputError, match="row c needs c.pkl: fetch it"):
        reproduce.choose_rows(TABLE, ["c"])
    with pytest.raises(InputError, match="no row d: choose from a, b, c"):
        reproduce.choose_rows(TABLE, ["a", "d"])
    touch(here / "c.pkl")
    assert reproduce.choose_rows(TABLE, None) == ["a", "b", "c"]


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_commands_are_ones_that_the_tools_take(here, name, monkeypatch):
    """Each is parsed by the tool itself, and names a config that exists."""
    import tools.benchmark
    import tools.evaluate
    import tools.pretrain
    import tools.show_views
    import tools.train_net

    table = reproduce.TABLES[name]
    steps, _ = reproduce.plan(table, list(table.rows), 2, out="o", runs="p", gpus=4,
                              options="--protocol moco --accumulate 2", set="SOLVER.AMP.ENABLED True")
    parsed = 0
    for step in steps:
        words = shlex.split(step.command)
        if not words:
            assert step.how
        elif words[0] != "tools/convert_to_d2.py":
            tool = getattr(tools, words[0].removeprefix("tools/").removesuffix(".py"))
            monkeypatch.setattr(sys, "argv", words)
            args = tool.parse()
            if getattr(args, "config_file", None):
                assert (ROOT / "configs" / args.config_file).is_file()
                assert name == "table7" or "OUTPUT_DIR" in args.overrides
                parsed += 1
    per_row = {"figure1": 0, "table7": 1}.get(name, 2)
    assert parsed == per_row * len(table.rows) + (name in ("table5", "table6"))  # RSA's pre-training
    assert len({step.done for step in steps}) == len(steps)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table8", "figure3"])
def test_linear_evaluation_reads_what_pretraining_leaves(name):
    """A run's checkpoint goes into its own evaluation, whose figures lie in a folder named after the recipe."""
    for row, (pretraining, evaluation) in reproduce.TABLES[name].rows.items():
        words = shlex.split(evaluation.command.format(runs="p", seed=1, done=evaluation.done.format(runs="p", seed=1)))
        recipe = shlex.split(pretraining.command)[2].removeprefix("pretrain/").removesuffix(".yaml")
        assert recipe.startswith(row) and words[2] == f"p/seed1/{recipe}/model_final.pth"
        assert words[-1] == f"p/seed1/{recipe}/linear.json" and words[words.index("--seed") + 1] == "1"
        assert pretraining.done.format(runs="p", seed=1) == words[2]


def test_tables_share_what_they_need(here):
    """RSA's 850 GPU-hours are spent once, whatever is asked for first, and so are the others'."""
    def steps(name, row, seed=0):
        return names(reproduce.plan(reproduce.TABLES[name], [row], seed + 1, out=name, runs="p", gpus=1, options="",
                                    set="")[0])

    pretraining = steps("table3", "imagenet_rsa")[0]
    assert pretraining == "p/seed0/imagenet_rsa_R50_200ep/model_final.pth"
    assert steps("table5", "rsa")[:2] == steps("table6", "rsa", seed=2)[:2] == [pretraining, "output/weights/rsa_r50.pkl"]
    assert steps("table1", "cifar10_rsa") == steps("table4", "cifar10_rsa") == steps("figure3", "cifar10_rsa")


def test_weights_of_another_pretraining_are_named(here, resnet50_checkpoint, monkeypatch, capsys):
    convert(resnet50_checkpoint, here / "output" / "weights" / "rsa_r50.pkl")
    command = ["reproduce.py", "table5", "--rows", "rsa", "--set", "SOLVER.AMP.ENABLED", "True", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    reproduce.main()
    said = capsys.readouterr().out
    assert "output/weights/rsa_r50.pkl holds rsa, step 7, not RSA's 125000 steps" in said and "1 of 2 to run" in said
    assert "SOLVER.AMP.ENABLED True" in said
    (here / "output" / "weights" / "rsa_r50.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="rsa_r50.pkl"):
        reproduce.main()


def test_weights_of_another_method_are_refused(here, resnet50_checkpoint, monkeypatch):
    convert(resnet50_checkpoint, here / "output" / "weights" / "infomin_r50.pkl")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table5", "--rows", "infomin", "--dry-run"])
    with pytest.raises(InputError, match=r"infomin_r50.pkl holds weights of rsa, and row infomin takes .*PyContrast"):
        reproduce.main()


def test_results_of_another_run_are_not_taken_for_done(here, monkeypatch, capsys):
    def results(*keys, iterations=90000):
        cfg = torchvision_defaults()
        cfg.merge_from_file(str(ROOT / "configs" / "transfer" / "mask_rcnn_R50_FPN_1x_random.yaml"))
        cfg.merge_from_list(["OUTPUT_DIR", "output/reproduce/table5/seed0/random", *keys])
        write_results(cfg, "detectron2", {}, None, iterations, 1.0)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "table5", "--rows", "random", "--dry-run", *options])
        reproduce.main()
        return capsys.readouterr().out

    results("SOLVER.AMP.ENABLED", True)
    assert "0 of 1 to run" in run() and "0 of 1 to run" in run("--set", "SOLVER.AMP.ENABLED", "True")
    with pytest.raises(InputError, match="results.json is of a run with SOLVER.STEPS .60000, 80000. and not .9, 10."):
        run("--set", "SOLVER.STEPS", "(9, 10)")
    results("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [64]])
    assert "0 of 1 to run" in run("--set", "MODEL.ANCHOR_GENERATOR.SIZES", "((16,), (64,))")
    results("SOLVER.MAX_ITER", 10, iterations=10)  # a trial of before
    with pytest.raises(InputError, match="is of a run with SOLVER.MAX_ITER 10 and not 90000: move it away"):
        run()
    assert "0 of 1 to run" in run("--set", "SOLVER.MAX_ITER", "10")
    results(iterations=5000)
    with pytest.raises(InputError, match="of a run with 5000 iterations"):
        run()
    (here / "output/reproduce/table5/seed0/random/results.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a run's results"):
        run()


@pytest.mark.parametrize("options, message", [
    (["table5", "--num-gpus", "0"], "--num-gpus is 0: it must be at least 1"),
    (["table5", "--set", "SEED"], "--set takes KEY VALUE pairs, but 'SEED' has no value"),
    (["table1", "--set", "SOLVER.EPOCHS", "1"], "--set: for fine-tuning, of which table1 has none"),
    (["figure3", "--protocol", "moco", "--num-gpus", "8"], "--num-gpus, --protocol: for"),
    (["table5", "--seeds", "0"], "--seeds is 0: it must be at least 1")])
def test_options_without_an_effect_are_refused(here, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *options])
    with pytest.raises(InputError, match=message):
        reproduce.main()


def test_dry_run_prints_commands_and_cost_and_runs_nothing(tool, tmp_path):
    done = tool("reproduce", "table5", "--rows", "random", "msra", "--seeds", 2, "--num-gpus", 8, "--dry-run",
                cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[69 GPU-hours] tools/train_net.py") == 4
    assert "4 of 4 to run, about 276 GPU-hours" in done.stdout and list(tmp_path.iterdir()) == []
    refused = tool("reproduce", "table6", "--rows", "moco_v2", cwd=tmp_path)
    assert refused.returncode == 2 and "moco_v2_r50.pkl" in refused.stderr and refused.stderr.count("\n") == 1


def test_stopped_and_called_again_it_goes_on_and_reports(here, monkeypatch, capfd):
    """Scripts stand for the tools: the second one fails the first time."""
    script = here / "step.py"
    script.write_text("import sys, pathlib\n"
                      "done, marker = map(pathlib.Path, sys.argv[1:3])\n"
                      "print('ran', done)\n"
                      "if marker.name != '-' and not marker.exists():\n"
                      "    marker.write_text(''); sys.exit(75)\n"
                      "done.parent.mkdir(parents=True, exist_ok=True); done.write_text('x')\n")
    report = here / "report.py"
    report.write_text("import sys, json; json.dump(sys.argv[1:], open('report.json', 'w'))\n")
    word = shlex.quote(str(script))
    rows = {"a": (Step("{out}/a/r", f"{word} {{done}} -", 1),), "b": (Step("{out}/b/r", f"{word} {{done}} m", 1),)}
    monkeypatch.setitem(reproduce.TABLES, "table5", Table(rows, shlex.quote(str(report))))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table5", "--output-dir", "o"])
    assert reproduce.main() == 75
    first = capfd.readouterr()
    assert "ran o/table5/a/r" in first.out and "stopped with status 75" in first.err
    assert not (here / "report.json").exists()
    assert reproduce.main() == 0
    second = capfd.readouterr().out
    assert "ran o/table5/b/r" in second and "ran o/table5/a/r" not in second and "1 of 2 to run" in second
    assert json.loads((here / "report.json").read_text()) == [
        "o/table5/a", "o/table5/b", "--output", "o/table5/report"]
    assert reproduce.main() == 0 and "0 of 2 to run" in capfd.readouterr().out


def test_executable():
    assert subprocess.run([str(ROOT / "tools" / "reproduce.py"), "--help"], capture_output=True).returncode == 0
