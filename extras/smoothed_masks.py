"""Was a mask saved with smoothed edges? Drawn with antialiasing, scaled with interpolation or kept
as a JPEG for a while, it has lines of ids between its regions that nobody has painted.

    if smoothed_share(ids) > CLEAR: ...

Between the regions 0 and 5 of such a mask lies a line of 2 or 3: its ids go up, or down, twice
within two pixels. In a mask that was painted few edges do so: a seventeenth at most in each of
CamVid's 701, a tenth in toy scenes; smoothed ones were at 0.53 to 1 (half as large by BOX: 0.15 to
0.46; as JPEGs of 0 and 255: 0.17 to 0.28).
"""

import numpy as np

CLEAR = 0.3                                                       # no painted mask comes near it
LIKELY = 0.15                                                     # for one that is wrong anyway
LINES = 120                                                       # about so many are looked at
WIDEST = 2                                                        # pixels of such a line
FEWEST = 20                                                       # of which a share is taken


def smoothed_share(ids):
    """uint8 (H, W) -> the share of the edges between distant ids that pass through an id between
    the two; 0 where there are too few to tell."""
    smooth = 0
    sharp = 0
    for lines in (ids, ids.T):                                    # along rows, and along columns
        step = max(1, len(lines) // LINES)
        through, direct = count_edges(np.ascontiguousarray(lines[::step]))
        smooth += through
        sharp += direct
    return smooth / (smooth + sharp) if smooth >= FEWEST else 0.0


def count_edges(lines):
    """Along the rows of uint8 (N, L): how often the ids pass through one between two others, and
    how often they jump."""
    row, column = np.nonzero(lines[:, 1:] != lines[:, :-1])       # the changes, from left to right
    before = lines[row, column].astype(int)
    after = lines[row, column + 1].astype(int)

    # Between a change and the next one of its row lies a run of one id.
    length = column[1:] - column[:-1]
    is_thin = (row[1:] == row[:-1]) & (length <= WIDEST)
    rises = (before[:-1] < after[:-1]) & (before[1:] < after[1:])
    falls = (before[:-1] > after[:-1]) & (before[1:] > after[1:])
    is_between = is_thin & (rises | falls)

    is_jump = np.abs(after - before) >= 2
    is_jump[:-1] &= ~is_between
    is_jump[1:] &= ~is_between
    return int(is_between.sum()), int(is_jump.sum())
