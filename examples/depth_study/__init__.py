"""What skip connections are for, in numbers: plain networks of growing depth beside their residual twins."""
