"""How well a network does what it is told: masks, presence, and whether the words matter at all.

    tally = Tally(questions)
    tally.add(mask, presence, label)              # of each image: probabilities, and its label
    result = tally.result()

For an image and a prompt k with the classes c(k): m is the mask's probability at the label's size,
s the presence's, g the truth in {0, 1}; all on the labelled pixels V. The thing is there, y, where
g is anywhere 1; the network says so, y', where s > 0.5; its mask is M* = [m > 0.5], and M = y' M*.

    presence     TP FP FN TN over all pairs; precision, recall, F1, MCC
    missing      the share of yes over the pairs whose word names a class that the image does not
                 show (missing_pairs of them): no knowledge of words alone makes it less than 1
    miou         per class prompt sum |M and g| / sum |M or g| over the images, then the mean:
                 "gated". miou_ungated: M* in place of M, pairs with y only
    sensitivity  mean over images and pairs a < b of SENSITIVITY_PROMPTS of the mean |m_a - m_b|.
                 Beside it what the truth has, and the same between the classes and between words
                 of one meaning. Noise has 1/3, so a high one by itself says nothing
    selectivity  mean over pairs with y of IoU(M*_k, g_k) minus the mean of IoU(M*_j, g_k) over the
                 other classes j that are there. Noise and constants have 0
    cgf1         100 x (mean over IoU thresholds 0.50 to 0.95 of F1 over the pairs with y) x MCC.
                 TP: y' and IoU(M, g) at the threshold; a mask that misses it is a false positive
                 and a false negative
    agreement    miou with the teacher's M in place of g

References
  Carion et al., SAM 3, 2025, arXiv:2511.16719: cgF1
"""

import math
from dataclasses import dataclass, field

import torch

from data import IGNORE
from extras.prompt_words import (
    ABSENT,
    NEVER_TRAINED,
    absent_words,
    class_prompts,
    members,
    nouns,
    words_of,
)

SENSITIVITY_PROMPTS = ("segment everything", "person", "car", "building")
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]
ABSENT_ASKED = 8                                                  # words that name nothing here
OUTCOMES = {                                                      # (is there, is said): its name
    (True, True): "tp", (False, True): "fp", (True, False): "fn", (False, False): "tn"}
NEVER_ASKED = 4                                                   # of NEVER_TRAINED


# ---------------------------------------------------------------- what is asked

@dataclass
class Questions:
    """The prompts of an evaluation, the same for every network on these data."""
    prompts: list                                                 # K strings
    table: torch.Tensor                                           # bool (K, C)
    classes: list                                                 # k of one prompt for each class
    synonyms: list                                                # (k, k) of one meaning
    sensitivity: list                                             # k of SENSITIVITY_PROMPTS
    pairs: list                                                   # k that presence is counted on
    never: list                                                   # k of words never trained with


def ask(class_names):
    """The questions about data with these classes -> Questions"""
    of_classes = class_prompts(class_names)
    nouns_asked = nouns(class_names, 17)
    absent = absent_words(class_names, ABSENT_ASKED, ABSENT)
    never = absent_words(class_names, NEVER_ASKED, NEVER_TRAINED)
    wanted = [*nouns_asked, *absent, *SENSITIVITY_PROMPTS, *never]
    prompts = list(dict.fromkeys(wanted))                         # each once, in this order
    place = {prompt: k for k, prompt in enumerate(prompts)}

    synonyms = []
    for name in class_names:
        first, *others = [word for word in words_of(name, class_names) if word in place]
        synonyms += [(place[first], place[other]) for other in others]
    counted = [*nouns_asked, *absent, "segment everything"]
    return Questions(
        prompts=prompts,
        table=members(prompts, class_names),
        classes=[place[prompt] for prompt in of_classes],
        synonyms=synonyms,
        sensitivity=[place[prompt] for prompt in SENSITIVITY_PROMPTS],
        pairs=[place[prompt] for prompt in counted],
        never=[place[prompt] for prompt in never],
    )


# ---------------------------------------------------------------- small formulas

def presence_scores(tp, fp, fn, tn):
    """-> {"precision", "recall", "f1", "mcc"}, nan where one is 0 / 0.

    Without negatives FP = TN = 0, so precision is 1, F1 = 2 R / (1 + R), and there is no MCC.
    """
    precision = tp / (tp + fp) if tp + fp else math.nan
    recall = tp / (tp + fn) if tp + fn else math.nan
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    mcc = (tp * tn - fp * fn) / math.sqrt(product) if product else math.nan
    return {"precision": precision, "recall": recall, "f1": f1, "mcc": mcc}


def mean_difference(maps, pairs):
    """Mean over `pairs` (a, b) of the mean |m_a - m_b|. maps (K, n); nan without pairs."""
    if not pairs:
        return math.nan
    differences = [(maps[a] - maps[b]).abs().mean() for a, b in pairs]
    return torch.stack(differences).mean().item()


def all_pairs(places):
    pairs = []
    for i, a in enumerate(places):
        pairs += [(a, b) for b in places[i + 1:]]
    return pairs


def mean_of(values):
    """The mean of those that are not nan; nan if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def ious_of(predicted, truth):
    """Bool (K, n) and (J, n) -> IoU of each with each (K, J), 1 for two that are empty."""
    a = predicted.float()
    b = truth.float()
    overlap = a @ b.T                                             # (K, J)
    union = a.sum(1)[:, None] + b.sum(1)[None] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


# ---------------------------------------------------------------- over the images

@dataclass
class Tally:
    """What is summed over the images; `result` makes the scores of it."""
    questions: Questions
    counts: dict = field(default_factory=lambda: dict.fromkeys(("tp", "fp", "fn", "tn"), 0))
    never_yes: list = field(default_factory=list)                 # of words never trained with
    missing_yes: list = field(default_factory=list)               # of classes not in the image
    gated: list = field(default_factory=list)                     # (overlap, union), each (K,)
    ungated: list = field(default_factory=list)
    agreed: list = field(default_factory=list)
    differences: dict = field(default_factory=dict)               # {name: [a number an image]}
    selectivity: list = field(default_factory=list)
    found: list = field(default_factory=list)                     # IoU of pairs with y; -1: no y'

    def add(self, mask, presence, label, teacher=None):
        """One image: mask (K, H, W) and presence (K,), probabilities; label (H, W).

        teacher: the bool (K, H, W) M of a teacher. -> M, for a student's tally
        """
        questions = self.questions
        valid = label != IGNORE                                   # (H, W)
        ids = label[valid].long()                                 # (n,)
        K, C = questions.table.shape
        names = torch.zeros(K, 256, dtype=torch.bool)
        names[:, :C] = questions.table
        truth = names[:, ids]                                     # (K, n)
        soft = mask[:, valid]                                     # (K, n)
        there = truth.any(1)                                      # (K,), y
        said = presence > 0.5                                     # (K,), y'
        ungated = soft > 0.5
        gated = ungated & said[:, None]

        self.count_presence(there, said)
        self.gated.append(overlap_and_union(gated, truth))
        shown = there[:, None]
        self.ungated.append(overlap_and_union(ungated & shown, truth & shown))
        if teacher is not None:
            self.agreed.append(overlap_and_union(gated, teacher[:, valid]))
        self.add_differences(soft, truth.float())
        self.add_selectivity(ungated, truth, there)
        self.add_found(gated, truth, there, said)
        return (mask > 0.5) & said[:, None, None]

    def count_presence(self, there, said):
        names_a_class = self.questions.table.any(1)               # (K,)
        for k in self.questions.pairs:
            outcome = OUTCOMES[bool(there[k]), bool(said[k])]
            self.counts[outcome] += 1
            if names_a_class[k] and not there[k]:
                self.missing_yes.append(float(said[k]))
        self.never_yes += said[self.questions.never].tolist()

    def add_differences(self, soft, truth):
        asked = all_pairs(self.questions.sensitivity)
        numbers = {
            "sensitivity": mean_difference(soft, asked),
            "sensitivity_truth": mean_difference(truth, asked),
            "between_classes": mean_difference(soft, all_pairs(self.questions.classes)),
            "between_synonyms": mean_difference(soft, self.questions.synonyms),
        }
        for name, number in numbers.items():
            self.differences.setdefault(name, []).append(number)

    def add_selectivity(self, ungated, truth, there):
        present = [k for k in self.questions.classes if there[k]]
        if len(present) < 2:
            return
        ious = ious_of(ungated[present], truth[present])          # (P, P): mask j, truth k
        own = ious.diagonal()
        others = (ious.sum(0) - own) / (len(present) - 1)
        self.selectivity += (own - others).tolist()

    def add_found(self, gated, truth, there, said):
        for k in self.questions.pairs:
            if not there[k]:
                continue
            iou = -1.0
            if said[k]:
                iou = ious_of(gated[k:k + 1], truth[k:k + 1]).item()
            self.found.append(iou)

    def result(self):
        """-> {name: number}; fractions but for cgf1, counts as they are, nan for what is not."""
        places = self.questions.classes
        scores = presence_scores(**self.counts)
        result = {
            "miou": mean_of(summed_ious(self.gated, places)),
            "miou_ungated": mean_of(summed_ious(self.ungated, places)),
            "iou": summed_ious(self.gated, places),
            **self.counts,
            **scores,
            "never_trained": mean_of([float(said) for said in self.never_yes]),
            "missing": mean_of(self.missing_yes),
            "missing_pairs": len(self.missing_yes),
            "selectivity": mean_of(self.selectivity),
            "cgf1": 100 * mean_of([f1_at(self.found, t) for t in THRESHOLDS]) * scores["mcc"],
        }
        if self.agreed:
            result["agreement"] = mean_of(summed_ious(self.agreed, places))
        for name, numbers in self.differences.items():
            result[name] = mean_of(numbers)
        return result


def overlap_and_union(predicted, truth):
    """Bool (K, n) each -> (pixels in both (K,), in either (K,))."""
    return (predicted & truth).sum(1), (predicted | truth).sum(1)


def summed_ious(counts, places):
    """[(overlap (K,), union (K,))] of the images -> IoU of each of `places`; nan for 0 / 0."""
    overlap = torch.stack([both for both, _ in counts]).sum(0).double()
    union = torch.stack([either for _, either in counts]).sum(0).double()
    return (overlap / union)[places].tolist()


def f1_at(found, threshold):
    """F1 over the pairs whose thing is there. found: their IoU, -1 where the network said no."""
    if not found:
        return math.nan
    tp = sum(iou >= threshold - 1e-9 for iou in found)
    answered = sum(iou >= 0 for iou in found)
    fp = answered - tp
    fn = len(found) - tp
    return 2 * tp / (2 * tp + fp + fn)
