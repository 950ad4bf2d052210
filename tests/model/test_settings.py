"""Each retrieval argument once: what reads the settings agrees with them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.places import REPO
from lm_eval.utils import simple_parse_args_string

from knn_lm_eval.benchmark.cell import KNN
from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import Buckets
from knn_lm_eval.model.params import Params
from knn_lm_eval.model.settings import DEFAULTS, RetrievalSettings, settings_table


def test_the_papers_settings_are_the_defaults() -> None:
    papers = {"k": 1024, "lmbda": 0.25, "knn_temp": 1.0, "min_knns": 1, "max_knns": 1024}
    assert papers | {"ngram_lmbda": 0.0} == DEFAULTS


def test_the_table_of_arguments_is_that_of_the_documentation() -> None:
    page = (REPO / "docs" / "reference" / "arguments.md").read_text(encoding="utf-8")
    table = page.partition("<!-- arguments: begin -->")[2].partition("<!-- arguments: end -->")[0]
    assert table.strip() == settings_table().strip(), "put what settings_table() gives between the two marks"


def test_every_setting_is_described() -> None:
    docstring = RetrievalSettings.__doc__ or ""
    for field in dataclasses.fields(RetrievalSettings):
        assert field.metadata["doc"] and field.metadata["default"], field.name
        assert f"\n    {field.name} : {field.metadata['doc'][:20]}" in docstring


def test_a_benchmarks_file_may_name_every_setting() -> None:
    assert {*KNN, "datastore"} == set(RetrievalSettings.names())


def test_a_models_arguments_are_split() -> None:
    settings, others = RetrievalSettings.take_from({"pretrained": "M", "k": 3, "dtype": "float16", "retomaton": 1})
    assert (settings.k, settings.retomaton, settings.lmbda) == (3, True, None)
    assert others == {"pretrained": "M", "dtype": "float16"}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"k": 0}, "k=0 must be a whole number of at least 1"),
        ({"k": 2.5}, "k=2.5 is not a whole number"),
        ({"k": True}, "k=True is not a number"),
        ({"k": "many"}, "k='many' is not a number"),
        ({"knn_temp": 0}, "knn_temp=0 must be a number above 0"),
        ({"knn_temp": math.inf}, "knn_temp=inf must be a number above 0"),
        ({"knn_temp": math.nan}, "knn_temp=nan must be a number above 0"),
        ({"min_knns": -1}, "min_knns=-1 must be a number of at least 0, or inf"),
        ({"max_knns": math.inf}, "max_knns=inf is not a whole number"),
        ({"context_len": 0}, "context_len=0 must be a whole number of at least 1"),
        ({"retomaton": "maybe"}, "retomaton='maybe' is neither True nor False"),
        ({"duplicates": "drop"}, "duplicates='drop' is unknown; use merge or keep"),
        ({"knn_sim_func": "cos"}, "knn_sim_func='cos' is unknown; use l2 or dot"),
        ({"retriever": "spark"}, "retriever='spark' is unknown; use local or ray"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(wrong: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        RetrievalSettings(**wrong)
    assert "\n" not in str(caught.value)


def test_whole_numbers_become_int_and_infinity_stays() -> None:
    settings = RetrievalSettings(k=1e3, max_knns=7.0, min_knns=math.inf)  # type: ignore[arg-type]
    assert (repr(settings.k), repr(settings.max_knns), settings.min_knns) == ("1000", "7", math.inf)


def test_what_is_given_wins_over_what_was_tuned_and_that_over_the_papers() -> None:
    buckets = Buckets((1.0,), (0.2, 0.1))
    tuned = Params({"k": 9, "knn_temp": 5.0, "lmbda": buckets.plain()}, {})
    in_force = RetrievalSettings(k=5).in_force(tuned, "params")
    assert (in_force.settings.k, in_force.settings.knn_temp, in_force.settings.probe) == (5, 5.0, None)
    assert in_force.weight == buckets and in_force.settings.lmbda == buckets.plain()
    assert in_force.sources == {"k": "given", "lmbda": "params", "knn_temp": "params", "probe": "index"}
    walking = RetrievalSettings(retomaton=True, min_knns=8).in_force(None, "params")
    assert (walking.settings.min_knns, walking.settings.max_knns) == (8, 1024)
    assert walking.sources["min_knns"] == "given" and walking.sources["max_knns"] == "default"


def test_tuned_numbers_are_checked_as_given_ones_are() -> None:
    with pytest.raises(UserError, match="knn_temp=-1.0 must be a number above 0"):
        RetrievalSettings().in_force(Params({"knn_temp": -1.0}, {}), "params")


def test_several_stores_pass_lm_evals_command_line() -> None:
    given = simple_parse_args_string("datastore=a/law+b/wiki,datastore_weights=2+0.5,exclude=law:x.txt+2024")
    settings, others = RetrievalSettings.take_from(given)
    assert (settings.datastore, settings.datastore_weights) == ("a/law+b/wiki", (2.0, 0.5)) and not others
    assert settings.exclude == ("law:x.txt", "2024") and settings.sources is None
    listed = RetrievalSettings(datastore=["a", "b"], datastore_weights=[2, 0.5], sources=["a"])
    assert (listed.datastore_weights, listed.sources) == ((2.0, 0.5), ("a",))
    assert RetrievalSettings(exclude=simple_parse_args_string("exclude=2024")["exclude"]).exclude == ("2024",)
