"""Reports of classifiers: accuracy or mean average precision, and how much sooner each arm reaches the baseline's."""

from waveletgpt.classify.page import write_score_report
from waveletgpt.classify.scores import score_headline, score_table, write_scores
from waveletgpt.report import Kind

KIND = Kind(write_scores, write_score_report, score_table, score_headline)
