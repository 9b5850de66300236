"""The depth study: plain networks of increasing depth compared with residual networks (He et al. 2015)."""
