"""What the scores of prompts say about networks whose answer is known: always yes, noise, a
constant, the truth.
"""

import math

import pytest
import torch

from extras.prompt_metrics import (
    THRESHOLDS,
    Tally,
    ask,
    f1_at,
    ious_of,
    presence_scores,
)
from losses import IGNORE

CLASSES = ["sky", "building", "road", "car", "person"]


def scenes(count=3, missing=()):
    """Labels (40, 60): a block of columns for each class, but for those `missing` in one scene."""
    labels = []
    for i in range(count):
        label = torch.arange(60)[None].repeat(40, 1) // 12
        label = label.roll(7 * i, 1)
        label[0] = IGNORE
        for c in missing:
            label[label == c] = 0
        labels.append(label.to(torch.uint8))
    return labels


def truth_of(questions, label):
    names = torch.zeros(len(questions.prompts), 256, dtype=torch.bool)
    names[:, :len(CLASSES)] = questions.table
    return names[:, label.long()].float()


def tally(answer, labels):
    """answer(questions, label) -> mask, presence"""
    questions = ask(CLASSES)
    counted = Tally(questions)
    for label in labels:
        counted.add(*answer(questions, label), label)
    return counted.result()


def the_truth(questions, label):
    mask = truth_of(questions, label)
    valid = label != IGNORE
    return mask, mask[:, valid].amax(1)


def noise(questions, label):
    K = len(questions.prompts)
    return torch.rand(K, *label.shape), torch.rand(K)


def constant(questions, label):
    K = len(questions.prompts)
    return torch.full((K, *label.shape), 0.8), torch.ones(K)


# ---------------------------------------------------------------- presence

def test_without_negatives_f1_is_what_recall_makes_it():
    """So "F1 = 0 because there are no negatives" cannot be: F1 = 0 means that no yes was said."""
    for tp, fn in ((10, 0), (7, 3), (1, 9)):
        scores = presence_scores(tp, 0, fn, 0)
        recall = tp / (tp + fn)
        assert scores["precision"] == 1 and scores["recall"] == recall
        assert scores["f1"] == pytest.approx(2 * recall / (1 + recall))
        assert math.isnan(scores["mcc"])
    assert presence_scores(0, 0, 10, 0)["f1"] == 0


def test_always_yes_and_always_no_on_an_all_positive_set():
    assert presence_scores(tp=10, fp=0, fn=0, tn=0)["f1"] == 1
    always_no = presence_scores(tp=0, fp=0, fn=10, tn=0)
    assert always_no["f1"] == 0 and math.isnan(always_no["precision"])


def test_mcc_against_its_definition_and_its_corners():
    assert presence_scores(5, 0, 0, 7)["mcc"] == 1
    assert presence_scores(0, 7, 5, 0)["mcc"] == -1
    a = torch.tensor([1.0] * 6 + [0.0] * 9)
    b = torch.tensor([1.0] * 4 + [0.0] * 2 + [1.0] * 3 + [0.0] * 6)
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert presence_scores(tp=4, fp=3, fn=2, tn=6)["mcc"] == pytest.approx(correlation, abs=1e-6)


def test_who_knows_the_words_only_says_yes_to_what_is_missing():
    """F1 and MCC look well then; this number does not."""
    def knows_words(questions, label):
        mask, _ = constant(questions, label)
        return mask, questions.table.any(1).float()

    without_cars = scenes(missing=[3])
    result = tally(knows_words, without_cars)
    assert result["never_trained"] == 0 and result["missing"] == 1
    assert result["missing_pairs"] == result["fp"] > 0            # no other pair is false
    assert tally(the_truth, without_cars)["missing"] == 0


# ---------------------------------------------------------------- the four known networks

def test_the_truth_has_the_best_of_all():
    result = tally(the_truth, scenes())
    for name in ("miou", "miou_ungated", "f1", "mcc"):
        assert result[name] == 1, name
    assert result["cgf1"] == pytest.approx(100)
    assert result["selectivity"] == 1
    assert result["sensitivity"] == pytest.approx(result["sensitivity_truth"])
    assert result["between_synonyms"] == 0 and result["between_classes"] > 0.3
    assert result["fp"] == result["fn"] == 0 and result["tn"] > 0 and result["never_trained"] == 0
    assert math.isnan(result["missing"]) and result["missing_pairs"] == 0


def test_a_constant_is_not_sensitive_and_not_selective():
    result = tally(constant, scenes())
    assert result["sensitivity"] == 0 and result["between_classes"] == 0
    assert result["selectivity"] == pytest.approx(0, abs=1e-6)
    assert result["recall"] == 1 and result["fn"] == result["tn"] == 0
    assert result["never_trained"] == 1
    assert math.isnan(result["mcc"]) and math.isnan(result["cgf1"])


def test_noise_passes_the_reports_gate_of_sensitivity_and_has_no_selectivity():
    """Two independent uniform maps differ by 1/3, and the gate asked for 0.25."""
    torch.manual_seed(0)
    result = tally(noise, scenes())
    assert result["sensitivity"] == pytest.approx(1 / 3, abs=0.01)
    assert result["sensitivity"] > 0.25
    assert abs(result["selectivity"]) < 0.03
    assert result["miou"] < 0.25 and abs(result["mcc"]) < 0.35


def test_sensitivity_is_a_distance_by_hand():
    questions = ask(CLASSES)
    label = scenes(1)[0]
    mask = torch.zeros(len(questions.prompts), 40, 60)
    values = {"segment everything": 0.9, "person": 0.1, "car": 0.4, "building": 0.4}
    for prompt, value in values.items():
        mask[questions.prompts.index(prompt)] = value
    counted = Tally(questions)
    counted.add(mask, torch.ones(len(questions.prompts)), label)
    expected = (0.8 + 0.5 + 0.5 + 0.3 + 0.3 + 0.0) / 6
    assert counted.result()["sensitivity"] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- masks

def test_one_presence_that_says_no_costs_the_gated_score_only():
    """One logit crosses 0.5, as a quantised student's may: gated falls, ungated does not."""
    def shy(questions, label):
        mask, presence = the_truth(questions, label)
        presence[questions.prompts.index("car")] = 0.49
        return mask, presence

    result = tally(shy, scenes())
    assert result["miou"] == pytest.approx(4 / 5)
    assert result["miou_ungated"] == 1
    assert result["fn"] == 3


def test_a_mask_where_the_thing_is_not_costs_the_gated_score_only():
    labels = [*scenes(1), *scenes(1, missing=[3])]

    def eager(questions, label):
        mask, presence = the_truth(questions, label)
        car = questions.prompts.index("car")
        if not presence[car]:
            mask[car, :, :12] = 1
            presence[car] = 1
        return mask, presence

    result = tally(eager, labels)
    assert result["iou"][3] == pytest.approx(0.5) and result["miou_ungated"] == 1
    assert result["fp"] == 1


def test_miou_sums_over_images_before_it_divides():
    """A half-right large car and a right small one are not the mean of their two IoUs."""
    large = torch.full((10, 20), 3, dtype=torch.uint8)
    small = torch.zeros(10, 20, dtype=torch.uint8)
    small[0, 0] = 3

    def half(questions, label):
        mask, presence = the_truth(questions, label)
        if label[5, 5] == 3:
            mask[questions.prompts.index("car"), :, 10:] = 0
        return mask, presence

    result = tally(half, [large, small])
    assert result["iou"][3] == pytest.approx(101 / 201)


def test_void_counts_nowhere():
    label = scenes(1)[0]
    label[:, 30:] = IGNORE

    def wild_in_void(questions, label):
        mask, presence = the_truth(questions, label)
        mask[:, :, 30:] = torch.rand(len(mask), 40, 30)
        return mask, presence

    assert tally(wild_in_void, [label])["miou"] == 1


def test_agreement_takes_the_teacher_in_place_of_the_truth():
    questions = ask(CLASSES)
    label = scenes(1)[0]
    teacher = torch.rand(len(questions.prompts), 40, 60) > 0.5
    counted = Tally(questions)
    counted.add(teacher.float(), torch.ones(len(questions.prompts)), label, teacher)
    assert counted.result()["agreement"] == 1


def test_cgf1_by_hand():
    """Three pairs: one at IoU 0.72, one said to be absent, one at 0.3."""
    found = [0.72, -1.0, 0.3]
    assert f1_at(found, 0.5) == pytest.approx(2 / (2 + 1 + 2))
    assert f1_at(found, 0.75) == 0
    hits = [f1_at(found, threshold) for threshold in THRESHOLDS]
    assert sum(hit > 0 for hit in hits) == 5
    assert f1_at([1.0, 0.5], 0.5) == 1


def test_ious_against_sets():
    predicted = torch.rand(3, 50) > 0.5
    truth = torch.rand(4, 50) > 0.5
    found = ious_of(predicted, truth)
    for i in range(3):
        for j in range(4):
            a = set(predicted[i].nonzero().flatten().tolist())
            b = set(truth[j].nonzero().flatten().tolist())
            assert found[i, j].item() == pytest.approx(len(a & b) / len(a | b))
