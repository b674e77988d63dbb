"""Memory, arithmetic and communication of a step on machines that are not at hand.

``python -m shampoo_core.plan --help`` is the tool; `make_plan` its function.
"""

from shampoo_core.plan.devices import DEVICES, Device
from shampoo_core.plan.layout import Placement, Sharding
from shampoo_core.plan.planning import Plan, Request, make_plan

__all__ = ["DEVICES", "Device", "Placement", "Plan", "Request", "Sharding", "make_plan"]
