"""The model card has metadata that the Hub accepts, and the facts that readers need."""

import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from hf_prefopt.reporting.card import CardFacts, LossFacts, is_hub_name, model_card, usage_snippet
from hf_prefopt.reporting.results import results_of
from tests.reporting.history import made_up_run

DPO = LossFacts("dpo", "−log σ(βh)", "2305.18290", hyperparameters={"beta": 0.1})


def facts(**changes) -> CardFacts:
    known = {
        "model_name": "smollm2-gsm8k",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "losses": [DPO],
        "is_adapter": True,
        "repository": "me/smollm2-gsm8k",
        "reference": "adapter_off",
        "datasets": ["trl-lib/ultrafeedback_binarized"],
        "data": {"training pairs": 160},
        "hyperparameters": {"learning_rate": 2e-4},
        "metrics": {"eval_loss": 0.6123456789},
    }
    return CardFacts(**{**known, **changes})


def test_metadata_survives_saving_and_loading(tmp_path):
    model_card(facts()).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == "peft"
    assert data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert {"hf_prefopt", "dpo"} <= set(data.tags)


def test_body_says_loss_paper_beta_reference_and_rounded_metrics():
    text = model_card(facts()).text
    for said in ("−log σ(βh)", "arxiv.org/abs/2305.18290", "beta = 0.1", "adapter_off"):
        assert said in text
    for said in ("0.6123", "| training pairs | 160 |", "torch"):
        assert said in text


def test_license_and_tags_of_the_user_join_the_metadata():
    card = model_card(facts(), tags="math", license="apache-2.0")
    assert card.data.license == "apache-2.0" and card.data.tags[-1] == "math" and "dpo" in card.data.tags


def test_several_losses_are_listed_with_their_weights():
    text = model_card(facts(losses=[LossFacts("dpo", weight=0.8), LossFacts("sft", weight=1.0)])).text
    assert "- 0.8 × **dpo**" in text and "- 1 × **sft**" in text


def test_folders_of_this_machine_stay_out_of_the_metadata(tmp_path):
    """The Hub rejects a card whose base model is not a Hub name, and a local folder is useless to others."""
    card = model_card(facts(base_model=str(tmp_path), datasets=[str(tmp_path)]))
    assert card.data.base_model is None and card.data.datasets is None


def test_the_setup_is_a_table_of_its_own_after_the_data():
    """A vertical bar in a text would end the table cell."""
    text = model_card(facts(setup={"loss": "1 × dpo, beta=0.1", "data": "a|b"})).text
    table = text.split("## Setup\n")[1].split("\n## ")[0]
    assert "| loss | 1 × dpo, beta=0.1 |" in table and "| data | a&#124;b |" in table
    assert text.index("## Evaluation") < text.index("## Data") < text.index("## Setup")
    assert "## Setup" not in model_card(facts()).text


HUB_NAMES = [
    ("gpt2", True),
    ("a/b", True),
    ("./a", False),
    ("/a/b", False),
    ("a/b/c", False),
    ("a model made in memory", False),
]


@pytest.mark.parametrize(("name", "expected"), HUB_NAMES)
def test_hub_names(name, expected):
    assert is_hub_name(name) is expected


@pytest.mark.parametrize("is_adapter", [True, False])
def test_usage_snippet_is_ten_lines_of_valid_python(is_adapter):
    snippet = usage_snippet(facts(is_adapter=is_adapter)).strip("`").removeprefix("python\n")
    compile(snippet, "snippet", "exec")
    assert len([line for line in snippet.splitlines() if line]) <= 10


def test_reporting_does_not_import_matplotlib_or_trl():
    """`import hf_prefopt` is fast, because importing these packages takes seconds."""
    modules = "hf_prefopt.reporting.card, hf_prefopt.reporting.closing, hf_prefopt.reporting.plots"
    code = f"import sys, {modules}; sys.exit(bool({{'matplotlib', 'trl'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_finished_run_has_results_answers_curves_and_an_index_for_the_hub():
    """All texts of the data and of the model's answers are escaped: no HTML, no Markdown, no broken table."""
    run = made_up_run()
    text = str(
        model_card(
            facts(
                results=results_of(run),
                answers=run.answers,
                has_curves=True,
                configuration="a: 1",
                serve="vllm serve m",
            )
        )
    )
    assert "| reward accuracy | 0.500 [0.200, 0.800] | 0.833 [0.400, 0.970] |" in text
    assert "| always the longer one |" in text and "3 prompts count, not 6 examples" in text
    assert r"| What is &lt;b&gt;2&lt;/b&gt;? | &#124; 5 &lt;script&gt; | 4&lt;U+202E&gt; |" in text
    assert "![Training curves](curves.png)" in text and "```yaml\na: 1\n```" in text and "vllm serve" in text
    (entry,) = ModelCard(text).data.eval_results
    assert entry.metric_value == 0.8333 and "0.400 to 0.970" in entry.metric_name


def test_license_and_base_come_from_the_card_of_a_local_model(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/model\n---\n# A model\n")
    data = model_card(facts(base_model=str(tmp_path))).data
    assert (data.license, data.base_model) == ("mit", "someone/model")
    assert model_card(facts(base_model=str(tmp_path)), license="apache-2.0").data.license == "apache-2.0"


def test_a_fence_is_longer_than_any_in_what_it_holds():
    text = model_card(facts(configuration="a: '````'")).text
    assert "`````yaml\na: '````'\n`````" in text


def test_the_citation_is_of_the_package_and_of_each_paper_once():
    text = model_card(facts(losses=[DPO, LossFacts("robust", paper="2305.18290"), LossFacts("sft")])).text
    assert text.count("@misc{arxiv_2305_18290,") == 1 and text.count("@software{hf_prefopt,") == 1
