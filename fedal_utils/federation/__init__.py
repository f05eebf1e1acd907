"""Who learns with whom: messages, aggregation, schemes, and the loop.

experiment   the loop of every notebook: read it first
setup        data of a setting, who holds what
schemes      who participates, who queries, what is sent: FedAvg, local-first, the chains, centralised
query        a client's query: which model is asked, what the strategy may observe
client       what stays with a client; local: how clients of this process train, and the initial model
messages     states packed to bytes; aggregate: averages, merging by class
evaluate     metrics and bytes at the end of a round
"""

from .aggregate import average, class_wise_shares
from .client import KEPT, Client, ClientLost
from .experiment import Experiment, runs, start
from .local import train_client
from .messages import State, Update, broadcast, pack, sent_keys, state_of, unpack
from .query import Query, query_size, select, strategy_at
from .schemes import SCHEMES, Step, method_of, plan
from .setup import Setup, class_counts, first_queries, partition_clients, prepare, setup_of
