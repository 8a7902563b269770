"""--save: what was typed runs again by its name."""

import yaml

TYPED = ["data.train_files=[a.jsonl]", "model=llama3_2_1b", "adapter=lora", "adapter.r=8"]
TYPED += ["optimizer.lr=1e-4", "adapter.settings={use_dora: true}", "model.revision=7e49710"]


def test_a_saved_recipe_is_what_was_typed(tmp_path, run_command, capfd):
    def run(*words: str) -> str:
        capfd.readouterr()
        assert run_command("cera-train", *words) == 0
        return capfd.readouterr().out

    saved = run(*TYPED, "--save", "mine/recipe/orders.yaml")
    assert saved == "saved      cera-train --config-dir mine +recipe=orders\n"
    again = run("--cfg", "job", "--config-dir", "mine", "+recipe=orders")
    assert yaml.safe_load(again) == yaml.safe_load(run("--cfg", "job", *TYPED, "name=orders"))
    assert "\n  r: 8\n" in run("--config-dir", "mine", "+recipe=orders", "--help")
    text = (tmp_path / "mine/recipe/orders.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert "\n  r: 8  # Rank\n" in text
    assert run_command("cera-train", "--save", "orders.yaml") == 2
