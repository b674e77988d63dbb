"""AlgoPerf entry: Distributed Shampoo under the external and the self-tuning ruleset."""
