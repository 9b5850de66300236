"""Device code. Host code, which chooses tiles and launches, has the same stem one folder up.

Every kernel that touches activations walks *tiles* of a matrix: in channels_last memory the rows are pixels and the
columns channels; in contiguous memory the rows are the images and the columns the pixels of one channel.
"""
