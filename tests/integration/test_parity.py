"""The parity command: what it finds equal, what it names as different on purpose, and that it can find a fault.

python -m pytest tests/integration/test_parity.py
"""

import json

import pytest
import tiny
import torch

from sana_kit.parity import comparisons
from sana_kit.parity.__main__ import DTYPES, main
from sana_kit.parity.comparisons import DIFFERS, EQUAL, PURPOSE, table


def test_the_command_offers_the_dtypes_that_are_compared():
    assert tuple(comparisons.DTYPES) == DTYPES


def verdicts(text):
    """(what, beside) -> (fp32, bf16, verdict) of a printed table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): tuple(row[2:5]) for row in rows[1:]}


def test_a_model_is_found_equal_and_what_is_not_is_named(tiny_model):
    said = []
    assert main(["--model", str(tiny_model), "--device", "cpu"], said.append) == 0
    found = verdicts("\n".join(said))
    assert {verdict for _, _, verdict in found.values()} == {EQUAL, PURPOSE} and len(found) == 16
    assert said[-1] == "\n16 of 16 as they should be"
    forward, embeds = found["transformer's forward", "diffusers"], found["prompt embeddings", "diffusers"]
    assert 0 < float(forward[0]) < 1e-5 < float(forward[1]) < 0.04 and float(embeds[0]) < 1e-5
    assert found["flow shift", "NVlabs"] == ("3, 3", "", EQUAL)
    assert found["choice of tokens", "NVlabs"][0].endswith("and 300")
    on_purpose = [what for what, (_, _, verdict) in found.items() if verdict == PURPOSE]
    assert ("time steps, none", "NVlabs") in on_purpose and ("instruction", "NVlabs") in on_purpose


def test_sprint_and_norms_have_lines_of_their_own(tmp_path):
    sprint = tiny.make_tiny_pipeline(tmp_path / "sprint", sprint=True)
    said = []
    assert main(["--model", str(sprint), "--dtypes", "fp32", "--device", "cpu"], said.append) == 0
    assert "cross-attention's norms" in said[1] and "| training | NVlabs | none | on purpose |" in said[1]


def test_faults_are_found(tmp_path, tiny_model, monkeypatch):
    """A wrong shift, latents and instruction, and an attention that is not diffusers': each is a line that DIFFERS."""
    folder = tiny.make_tiny_pipeline(tmp_path / "odd")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "flow_shift": 6.0}))
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    monkeypatch.setattr(comparisons, "parse_instruction", lambda text: ["Draw: "])
    monkeypatch.setattr(comparisons, "encode_pixels", lambda vae, pixels: vae.encode(pixels).latent)

    def drop_the_mask(transformer, attention, device):
        transformer.register_forward_pre_hook(
            lambda module, args, words: (args, {**words, "encoder_attention_mask": None}), with_kwargs=True
        )

    monkeypatch.setattr(comparisons, "set_attention", drop_the_mask)
    said = []
    assert main(["--model", str(folder), "--dtypes", "fp32", "--device", "cpu"], said.append) == 1
    wrong = {key for key, row in verdicts_of(said[1]).items() if row == DIFFERS}
    assert wrong == {
        ("flow shift", "NVlabs"),
        ("latents x scale", "diffusers"),
        ("instruction", "diffusers"),
        ("instruction", "NVlabs"),
        ("transformer's forward", "diffusers"),
    }
    assert said[-1].endswith("5 DIFFER")


def verdicts_of(text):
    """(what, beside) -> verdict of a table of one dtype."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row[3] for row in rows[1:]}


@pytest.mark.parametrize(("ours", "word"), [(torch.ones(2), "0"), (torch.ones(3), "inf")])
def test_a_difference_is_relative_and_another_shape_is_infinite(ours, word):
    found = {"fp32": comparisons.relative(ours * 2, torch.ones(2) * 2)}
    assert word in table([comparisons.Row("a", "b", found, comparisons.judge(found))], ["fp32"])
    assert comparisons.judge(found) == (EQUAL if word == "0" else DIFFERS)


def test_another_scale_is_a_fault_of_the_same_autoencoder_alone():
    assert comparisons._scale(0.41407, 32, 32).verdict == comparisons._scale(0.41407, 8, 4).verdict == EQUAL
    assert comparisons._scale(0.5, 32, 32).verdict == comparisons._scale(None, 32, 32).verdict == DIFFERS
    other = comparisons._scale(0.5, 8, 32)
    assert other.verdict == comparisons.PURPOSE and "32 channels for 8 x 8 pixels" in other.note
