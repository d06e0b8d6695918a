"""What is probably wrong with a data set that can be read: warnings, each of which says what to do.

    for sentence in advise(spec, splits):         # {split: (dataset, Findings)}, of check_data.py
        print(f"warning: {sentence}")

None of these needs to be a mistake, so none stops a run.
"""

import numpy as np

from data import IGNORE, Files, Folder
from extras.crop_advice import describe_large, describe_padding
from extras.shared_pictures import SAME, compare, find_alike
from train import FLAGS

MUCH_VOID = 0.2                                                   # of all pixels
MOST_LISTED = 5                                                   # classes, in a sentence


def advise(spec, splits):
    """spec: as open_dataset's; splits: {split: (dataset, what reading it found)} -> sentences."""
    sentences = advise_on_masks(splits)
    sentences += advise_on_classes(splits)
    sentences += advise_on_sizes(spec, splits)
    sentences += advise_on_shared_pictures(splits)
    return sentences


# ---------------------------------------------------------------- masks and classes

def advise_on_masks(splits):
    """Edges that were smoothed, though every id is a class's."""
    sentences = []
    for dataset, found in splits.values():
        for i in found.smoothed:
            where = dataset.paths[i][1] if isinstance(dataset, Files) else dataset.where(i)
            sentences.append(f"{where}: between its regions lie thin lines of ids in between, as "
                             f"smoothing or scaling leaves: save masks without smoothed edges, "
                             f"scale them with NEAREST")
    return sentences


def advise_on_classes(splits):
    """Classes that no label has, or those of one split alone. Nothing is said of what could not be
    read whole."""
    if not splits or any(found.problems for _, found in splits.values()):
        return []
    dataset = next(iter(splits.values()))[0]
    counts = {split: found.counts for split, (_, found) in splits.items()}
    total = sum(counts.values())
    painted = set(np.flatnonzero(total).tolist())
    if painted == {0, IGNORE}:
        return [explain_0_and_255(dataset)]
    if len(dataset.classes) == 1:
        return [f"{dataset.name}: there is one class, so there is nothing to tell apart: make "
                f"what else is to be seen a class too, such as 'background'"]
    if "train" not in splits or "val" not in splits:
        return []
    void = total[IGNORE] / total.sum()
    return compare_classes(dataset, counts, total, void)


def explain_0_and_255(dataset):
    """What most tools paint for a single thing: black and white."""
    start = f"{dataset.name}: its labels hold the ids 0 and 255 alone, and 255 is void here"
    if len(dataset.classes) == 1:
        return (f"{start}: if it was meant as a class, write 1 in its place, and name both in "
                f"classes.txt")
    if len(dataset.classes) == 2:
        return f"{start}: if it was meant as {name_classes(dataset, [1])}, write 1 in its place"
    return (f"{start}: if it was meant as a class, such as 1 {dataset.classes[1]!r}, write that id "
            f"in its place")


def compare_classes(dataset, counts, total, void):
    """counts: {split: pixels of each id}, of all splits `total`; void: its share of all pixels."""
    ids = range(len(dataset.classes))
    unmet = [i for i in ids if not total[i]]
    untrained = [i for i in ids if total[i] and not counts["train"][i]]
    unscored = [i for i in ids if counts["train"][i] and not counts["val"][i]]
    lists = " (train.txt and val.txt name the frames)" if isinstance(dataset, Folder) else ""
    sentences = []
    if unmet:
        hint = "painted with another id, or left out of the export?"
        if void >= MUCH_VOID:
            hint = (f"void is {100 * void:.0f} % of all pixels, and 255 is void here: if it was "
                    f"meant as class {unmet[0]}, write {unmet[0]} in its place")
        sentences.append(f"{dataset.name}: no label has {name_classes(dataset, unmet)}: {hint}")
    if untrained:
        others = [split for split in counts if counts[split][untrained].any()]
        sentences.append(f"{dataset.name}: {' and '.join(others)} has "
                         f"{name_classes(dataset, untrained)}, and train has not, so it cannot be "
                         f"learned: move some frames that show it to train{lists}")
    if unscored:
        sentences.append(f"{dataset.name}: train has {name_classes(dataset, unscored)}, and val "
                         f"has not, so it is not scored: move some frames that show it to "
                         f"val{lists}")
    return sentences


def name_classes(dataset, ids):
    """[2, 5] -> class 2 'car', 5 'pole' (and 3 more)"""
    names = [f"{i} {dataset.classes[i]!r}" for i in ids[:MOST_LISTED]]
    more = f" and {len(ids) - MOST_LISTED} more" if len(ids) > MOST_LISTED else ""
    return "class " + ", ".join(names) + more


# ---------------------------------------------------------------- sizes

def advise_on_sizes(spec, splits):
    """Does the crop that train.py takes by itself fit the train frames?"""
    if "train" not in splits:
        return []
    dataset, found = splits["train"]
    defaults = FLAGS.defaults_for(spec.partition(":")[0])
    if not found.sizes or defaults["augment"] == "plain":         # which scales frames to the crop
        return []
    sizes = {tuple(dataset.size): len(dataset)} if dataset.size else found.sizes
    padding = describe_padding(sizes, defaults["crop"], defaults["scale_range"])
    large = describe_large(sizes, defaults["crop"])
    return [f"{dataset.name}, trained with the default --crop: {sentence}"
            for sentence in (padding, large) if sentence]


# ---------------------------------------------------------------- what is trained on and scored on

def advise_on_shared_pictures(splits):
    """Pictures of val and test that are in train too, and other pictures of the same name."""
    if "train" not in splits:
        return []
    sentences = []
    for split in ("val", "test"):
        if split in splits:
            sentences += compare_with_train(splits["train"], splits[split])
    return sentences


def compare_with_train(train_split, other_split):
    train, train_found = train_split
    dataset, found = other_split
    sentences = []
    named = set()
    for i, j in find_alike(train_found.miniatures, found.miniatures):
        kind = compare(train.read_image(i), dataset.read_image(j))
        if kind is None:
            continue
        named.add(dataset.stems[j])
        how = "" if kind == SAME else " (scaled, saved again, or the next one of a video)"
        sentences.append(f"{dataset.where(j)}: {kind} {train.stems[i]!r} of train{how}: a network "
                         f"would be scored on what it learned: take one of the two out")
    trained = set(train.stems)
    for j, stem in enumerate(dataset.stems):
        if stem in trained and stem not in named:
            sentences.append(f"{dataset.where(j)}: train has another frame of this name, which "
                             f"--fold refuses: rename one of the two")
    return sentences
