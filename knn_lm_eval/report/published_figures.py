"""Published perplexities per token, as reference rows beside one's own: other LMs, tokenizers and hardware."""

from __future__ import annotations

from dataclasses import dataclass

KNN_TRANSFORMERS = "github.com/neulab/knn-transformers, README"
EFFICIENT_KNNLM = "github.com/jxhe/efficient-knnlm, README"
EFFICIENT_KNNLM_ISSUE = EFFICIENT_KNNLM + " and issue 2"
RETOMATON = "github.com/neulab/retomaton, README"
HERE = "README of knn_lm_eval, measured with Python 3.11"

NOT_REPRODUCED = (
    "three public threads (knn-transformers issues 14, 17 and 18) could not reproduce them: gpt2 gave 17.34 with the "
    "defaults, and gpt2-large needed knn_temp=13"
)
PER_WORD = "per word of a tokenized text (fairseq's --remove-bpe), not per token"
OTHER_PYTHONS = "with another Python the text is another"


@dataclass(frozen=True)
class PublishedFigure:
    """A figure and where it stands.

    Attributes
    ----------
    task : the task here that has the same text.
    caveat : what is known to speak against the figure, in a sentence's words; empty where nothing is.
    """

    model: str
    method: str
    task: str
    value: float
    source: str
    caveat: str = ""
    metric: str = "token_perplexity"


PUBLISHED_FIGURES = [
    PublishedFigure("distilgpt2, fine-tuned", "base", "wikitext103_valid", 18.25, KNN_TRANSFORMERS),
    PublishedFigure(
        "distilgpt2, fine-tuned", "kNN-LM", "wikitext103_valid", 15.03, KNN_TRANSFORMERS, caveat=NOT_REPRODUCED
    ),
    PublishedFigure("distilgpt2, fine-tuned", "RetoMaton", "wikitext103_valid", 14.71, KNN_TRANSFORMERS),
    PublishedFigure("gpt2, fine-tuned", "base", "wikitext103_valid", 14.84, KNN_TRANSFORMERS),
    PublishedFigure("gpt2, fine-tuned", "kNN-LM", "wikitext103_valid", 12.57, KNN_TRANSFORMERS, NOT_REPRODUCED),
    PublishedFigure("gpt2, fine-tuned", "RetoMaton", "wikitext103_valid", 12.44, KNN_TRANSFORMERS),
    PublishedFigure("transformer_lm (fairseq)", "base", "wikitext103", 18.66, EFFICIENT_KNNLM),
    PublishedFigure("transformer_lm (fairseq)", "kNN-LM, approximate distances", "wikitext103", 16.65, EFFICIENT_KNNLM),
    PublishedFigure("transformer_lm (fairseq)", "kNN-LM, exact distances", "wikitext103", 16.12, EFFICIENT_KNNLM_ISSUE),
    PublishedFigure("wmt19.en (fairseq)", "base", "law", 106.56, EFFICIENT_KNNLM, PER_WORD),
    PublishedFigure("wmt19.en (fairseq)", "kNN-LM, index on CPU", "law", 12.64, EFFICIENT_KNNLM, PER_WORD),
    PublishedFigure("wmt19.en (fairseq)", "kNN-LM, index on GPU", "law", 12.32, EFFICIENT_KNNLM, PER_WORD),
    PublishedFigure("wmt19.en, fine-tuned (fairseq)", "base", "law", 8.61, RETOMATON, PER_WORD),
    PublishedFigure("wmt19.en, fine-tuned (fairseq)", "kNN-LM", "law", 7.93, RETOMATON, PER_WORD),
    PublishedFigure("wmt19.en, fine-tuned (fairseq)", "RetoMaton", "law", 7.10, RETOMATON, PER_WORD),
    PublishedFigure("SmolLM2-135M", "base", "python_docs", 11.83, HERE, OTHER_PYTHONS),
    PublishedFigure("SmolLM2-135M", "kNN-LM", "python_docs", 8.82, HERE, OTHER_PYTHONS),
]
