import json
import shutil

import processes
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sparse_peft import SparseLoraConfig, cli, hub
from hf_sparse_peft.tuners import adapter_layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base and two adapters of it on disk: rows with a low-rank half, and entries alone."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes)).save_pretrained(root / "base")
    for name, options in (("rows", {"r": 2, "granularity": "row", "density": 0.1}), ("entries", {"r": 0})):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        config = SparseLoraConfig(**{"density": 0.05, "target_modules": ["q_proj", "up_proj"], **options})
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(std=0.2)
        hub.save_adapter(model, root / name)
    return root


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(12).view(2, 6)).logits.float()


def reference(folders, name):
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    return logits(PeftModel.from_pretrained(base, folders / name))


def test_inspect_prints_a_line_for_each_module(folders, capsys):
    assert cli.main(["inspect", str(folders / "rows"), "--modules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "shape", "support", "rank", "density", "parameters", "bytes"]
    assert any("q_proj" in line and "32x32" in line and "3 row" in line for line in lines)
    assert "2 modules" in lines[3]
    assert "living parameters" in lines[-1]


def test_inspect_names_the_damage_and_fails(folders, tmp_path, capsys):
    shutil.copytree(folders / "rows", tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert cli.main(["inspect", str(tmp_path / "cut")]) == 1
    assert "is truncated" in capsys.readouterr().err


@pytest.mark.parametrize(("adapter", "to"), [("rows", "lora"), ("entries", "shira")])
def test_export_writes_what_plain_peft_loads(folders, tmp_path, capsys, adapter, to):
    command = ["export", str(folders / adapter), "--base", str(folders / "base"), "--to", to, str(tmp_path / "out")]
    assert cli.main(command) == 0
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].peft_type == to.upper()
    torch.testing.assert_close(logits(loaded), reference(folders, adapter), atol=2e-5, rtol=1e-5)
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_export_pads_and_cuts_ranks(folders, tmp_path, capsys):
    source = [str(folders / "rows"), "--base", str(folders / "base"), "--to", "lora"]
    assert cli.main(["export", *source, "--uniform-rank", "9", str(tmp_path / "padded")]) == 0
    assert {
        t.shape[0] for k, t in load_file(tmp_path / "padded/adapter_model.safetensors").items() if "lora_A" in k
    } == {9}
    source[0] = str(folders / "entries")
    assert cli.main(["export", *source, str(tmp_path / "none")]) == 1
    assert "Pass --rank" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="cut updates to rank 4"):
        assert cli.main(["export", *source, "--rank", "4", str(tmp_path / "cut")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "rank", "relative", "error"]
    assert [line.split()[1] for line in lines[1:3]] == ["4", "4"]
    assert all(0 < float(line.split()[2]) < 1 for line in lines[1:3])
    assert cli.main(["export", *source[:-1], "dense", "--rank", "4", str(tmp_path / "x")]) == 2
    assert "--rank and --uniform-rank belong to --to lora" in capsys.readouterr().err


def test_merge_takes_the_base_from_the_config(folders, tmp_path):
    # A folder saved by a model that was loaded from disk names that folder.
    named = json.loads((folders / "entries" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folders / "base")
    assert cli.main(["merge", str(folders / "entries"), str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not adapter_layers(dense)
    torch.testing.assert_close(logits(dense), reference(folders, "entries"), atol=1e-5, rtol=1e-5)


def test_merge_into_a_dequantised_nf4_base(folders, tmp_path):
    command = [
        "merge",
        str(folders / "entries"),
        str(tmp_path / "dense"),
        "--nf4",
        "--double-quant",
        "--dtype",
        "float32",
    ]
    assert cli.main(command) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert not torch.allclose(logits(dense), reference(folders, "entries"), atol=1e-4)


@pytest.mark.parametrize(("extra", "says"), [(["--double-quant"], "pass --nf4 too"), (["--dtype", "int"], "--dtype")])
def test_options_that_make_no_sense_are_refused(folders, tmp_path, capsys, extra, says):
    status = 1 if extra[0] == "--dtype" else 2
    assert cli.main(["merge", str(folders / "entries"), str(tmp_path / "x"), *extra]) == status
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_runs_as_a_module(folders):
    done = processes.python("-m", "hf_sparse_peft", "inspect", folders / "rows", check=True)
    assert "q_proj" in done.stdout


def test_rank_reports_print_a_table_and_draw_a_picture(folders, tmp_path, capsys):
    source = [str(folders / "rows"), "--base", str(folders / "base")]
    assert cli.main(["intruders", *source, "--k", "4", "--picture", str(tmp_path / "intruders.png")]) == 0
    printed = capsys.readouterr().out
    assert "intruders" in printed
    assert "2 modules" in printed
    assert (tmp_path / "intruders.png").stat().st_size > 5_000
    assert cli.main(["intruders", *source, "--k", "0"]) == 1
    assert "--k 0 counts leading singular vectors" in capsys.readouterr().err


def test_the_utilized_rank_reads_a_text(folders, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(20)}}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    base = tmp_path / "base"
    shutil.copytree(folders / "base", base)
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(base)
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7\n")
    command = ["utilized-rank", str(folders / "rows"), "--base", str(base), "--text", str(tmp_path / "text.txt")]
    assert cli.main([*command, "--picture", str(tmp_path / "ranks.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "utilized", "weight", "inputs", "outputs", "of"]
    assert all(1 <= int(line.split()[1]) <= 7 for line in lines[1:3])
    assert (tmp_path / "ranks.png").stat().st_size > 5_000


def test_export_to_patch_serves_what_the_adapter_does(folders, tmp_path, capsys):
    command = ["export", str(folders / "entries"), str(tmp_path / "patch"), "--to", "patch"]
    base = ["--base", str(folders / "base")]
    assert cli.main([*command, *base]) == 0
    assert "values of 2 tensors, 0 left out" in capsys.readouterr().out
    server = AutoModelForCausalLM.from_pretrained(folders / "base")
    hub.apply_patch(server, tmp_path / "patch")
    torch.testing.assert_close(logits(server), reference(folders, "entries"), atol=1e-5, rtol=1e-5)
    for options, message in (
        (["--nf4"], "leave --nf4 out"),
        (["--only", "low_rank"], "takes support or modules"),
        (["--encoding", "xor"], "belongs to --format slime"),
        (["--rank", "2"], "belong to --to lora"),
    ):
        assert cli.main([*command, *base, *options]) == 2
        assert message in capsys.readouterr().err
    hybrid = ["export", str(folders / "rows"), str(tmp_path / "rows"), "--to", "patch", *base]
    assert cli.main(hybrid) == 1
    assert "--only support" in capsys.readouterr().err
    assert cli.main([*hybrid, "--only", "support"]) == 0
    assert cli.main(["export", str(folders / "rows"), str(tmp_path / "x"), "--to", "lora", "--format", "slime"]) == 2
    assert "--format belongs to --to patch" in capsys.readouterr().err
