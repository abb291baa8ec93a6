"""Learning rate, resolution and batch size as functions of the fractional epoch; prints a table."""

from megabatch import learning_rate

TOTAL_EPOCHS = 90
SCHEDULES = {
    "poly": {"decay": "poly", "poly_power": 2.0},  # LARS recipes (You et al. 2017)
    "cosine": {"decay": "cosine"},
    "step": {"decay": "step", "lr_factors": [(0, 1.0), (30, 0.1), (60, 0.01), (80, 0.001)]},  # Goyal et al. 2017
    "slow start": {"decay": "slow_start", "warmup": "none"},  # Akiba et al. 2017
}

print("epoch", *(f"{name:>10}" for name in SCHEDULES))
for epoch in (0, 2.5, 5, 30, 60, 85):
    rates = [
        learning_rate(
            epoch, **{"peak_lr": 3.2, "total_epochs": TOTAL_EPOCHS, "warmup": "linear", "warmup_epochs": 5} | s
        )
        for s in SCHEDULES.values()
    ]
    print(f"{epoch:5}", *(f"{rate:10.4f}" for rate in rates))
