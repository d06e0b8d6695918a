"""The real SAM 3 as a teacher: what it says about each frame, as files to learn from.

    python -m extras.prompt_sam3 --data camvid:DIR --out stored [--weights facebook/sam3]
    python -m extras.prompt train --teacher-files stored --data camvid:DIR ...

For a machine that has SAM 3's weights (gated) and transformers 5 or newer. It was NOT RUN on such
a machine: here only the writing of files was, with a stand-in for the model that returns what
transformers documents of it. The files: extras/prompt_teacher_files.py.

References
  Carion et al., SAM 3, 2025, arXiv:2511.16719
  transformers, model_doc/sam3: Sam3Model, Sam3Processor.post_process_instance_segmentation
"""

import argparse

import numpy as np
import torch
from PIL import Image

from data import SPLITS, open_dataset
from extras.cli import UsageError, add_fold_flags, make_folder, run_command
from extras.machine import pick_device
from extras.packages import import_package
from extras.prompt_teacher_files import LOWEST_SCORE, write_instances_file
from extras.prompt_words import choose_prompts


def open_sam3(weights, device):
    """-> (processor, model). Raises UsageError where they are not to be had."""
    transformers = import_package("transformers", "SAM 3 needs, 5 or newer,")
    if not hasattr(transformers, "Sam3Model"):
        raise UsageError("SAM 3 needs a newer transformers: pip install --upgrade transformers")
    from transformers import Sam3Model, Sam3Processor

    try:
        processor = Sam3Processor.from_pretrained(weights)
        model = Sam3Model.from_pretrained(weights).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"SAM 3's weights {weights} cannot be opened: {reason}") from None
    return processor, model


@torch.no_grad()
def ask_sam3(processor, model, frame, prompts, device):
    """RGB uint8 (H, W, 3) -> (presence logits (K,), [(masks bool (N, H, W), scores (N,))])."""
    picture = Image.fromarray(frame)
    size = frame.shape[:2]
    presence = []
    found = []
    for prompt in prompts:
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device)
        outputs = model(**inputs)
        result = processor.post_process_instance_segmentation(
            outputs, threshold=LOWEST_SCORE, mask_threshold=0.5, target_sizes=[size])[0]
        masks = result["masks"].cpu().bool().numpy().reshape(-1, *size)
        presence.append(outputs.presence_logits.float().max().item())
        found.append((masks, result["scores"].float().cpu().numpy()))
    return np.array(presence), found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.prompt_sam3",
        description="Store what SAM 3 says about each frame. Not run by us: no weights.")
    parser.add_argument("--data", required=True, metavar="SPEC",
                        help="toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    parser.add_argument("--split", default="train", choices=SPLITS, help="(default: train)")
    add_fold_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where DIR/STEM.npz go")
    parser.add_argument("--weights", default="facebook/sam3", metavar="NAME",
                        help="a folder, or a name on Hugging Face's hub (default: facebook/sam3)")
    parser.add_argument("--absent", type=int, default=8, metavar="N",
                        help="words that the data do not have, asked too (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args()
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    device = pick_device(args.device)
    processor, model = open_sam3(args.weights, device)
    prompts = choose_prompts(dataset.classes, 21, args.absent)
    folder = make_folder(args.out)
    for i, stem in enumerate(dataset.stems):
        frame = dataset[i][0].permute(1, 2, 0).numpy()
        presence, found = ask_sam3(processor, model, frame, prompts, device)
        write_instances_file(folder / f"{stem}.npz", prompts, presence, found)
    print(f"{len(dataset)} files in {folder}")


if __name__ == "__main__":
    run_command(main)
