"""What a network costs and which groups it keeps, counted, timed and drawn."""
from .cost import Comparison, Cost, kernel_ratio
from .kept import LayerGroups, NetworkGroups, StageGroups, network_groups
from .network import NetworkProfile, StageProfile, profile_model

__all__ = [
    'Comparison', 'Cost', 'LayerGroups', 'NetworkGroups', 'NetworkProfile', 'StageGroups', 'StageProfile',
    'kernel_ratio', 'network_groups', 'profile_model',
]
