"""Unpacks the archives of ILSVRC 2012 into FOLDER/train/WNID and FOLDER/val/WNID.

    python unpack_archives.py ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz FOLDER

WNID is a class's WordNet identifier, such as n01440764. Needs scipy for the table of classes. Once stopped, start it
again: existing files are overwritten.
"""

import io
import sys
import tarfile
from pathlib import Path

from scipy.io import loadmat

train, val, devkit, folder = map(Path, sys.argv[1:])

with tarfile.open(devkit) as kit:
    members = {Path(member.name).name: member for member in kit}
    rows = loadmat(io.BytesIO(kit.extractfile(members["meta.mat"]).read()), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    numbers = kit.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()

with tarfile.open(train) as archives:
    for archive in archives:
        with tarfile.open(fileobj=archives.extractfile(archive)) as images:
            images.extractall(folder / "train" / Path(archive.name).stem, filter="data")
        print(archive.name)

with tarfile.open(val) as images:
    for image in images:
        number = int(Path(image.name).stem.rpartition("_")[2])  # ILSVRC2012_val_00000001.JPEG is the first
        images.extract(image, folder / "val" / wnids[int(numbers[number - 1])], filter="data")
print(f"{len(numbers):,} validation images")
