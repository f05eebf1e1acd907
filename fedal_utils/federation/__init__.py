"""Who learns with whom: messages, aggregation, schemes, and the loop.

experiment   the loop of every notebook: read it first
setup        data of a setting, who holds what
schemes      who participates, who queries, what is sent: FedAvg, local-first, the chains, centralised
query        a client's query: which model is asked, what the strategy may observe
client       what stays with a client, and what it sends
aggregate    averages, merging by class; local: how clients of this process train and models are evaluated
"""

from .aggregate import average, class_wise_shares
from .client import KEPT, Client, ClientLost, State, Update, broadcast, pack, state_of, unpack
from .experiment import Experiment, runs, start
from .local import train_client
from .query import query_size, select
from .schemes import SCHEMES, Step, method_of, plan
from .setup import Setup, class_counts, first_queries, partition_clients, prepare, setup_of
