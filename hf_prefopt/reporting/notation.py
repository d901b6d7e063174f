"""The symbols in the formulas of the losses."""

SYMBOLS = (
    "s is the sum of the policy's log-probs (nats) over a response's scored tokens, and s̄ their mean",
    "r = s − s_ref is the log-ratio to the reference, and r̄ the log-ratio per token",
    "w, l and g are the chosen, the rejected and the gold response",
    "h = r_w − r_l",
    "σ is the logistic function, and ℓ(z) = −log σ(z)",
    "sg stops the gradient",
    "R is a score from the dataset",
)
NOTATION = "; ".join(SYMBOLS) + "."
