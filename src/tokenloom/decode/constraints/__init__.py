"""What may be generated: one protocol, and constraints by JSON schema, regular expression, grammar or any predicate.

    constraint = RegexConstraint(tokenizer, pattern=r"[0-9]{4}-[0-9]{2}")
    model.generate(**inputs, do_sample=True, top_k=0, custom_generate=decode.loop("awrs", constraint=constraint))

By name: `decode.build("constraint", "regex", {"tokenizer": tokenizer}, pattern=...)`; from one text, as on the command
line: `read("regex=[0-9]{2,4}").made(tokenizer)`. `Masks` makes a logits processor of any of them.
"""

from tokenloom.decode.constraints.grammar import ChoiceConstraint as ChoiceConstraint
from tokenloom.decode.constraints.grammar import GrammarConstraint as GrammarConstraint
from tokenloom.decode.constraints.grammar import JsonSchemaConstraint as JsonSchemaConstraint
from tokenloom.decode.constraints.grammar import RegexConstraint as RegexConstraint
from tokenloom.decode.constraints.masks import Masks as Masks
from tokenloom.decode.constraints.masks import standing as standing
from tokenloom.decode.constraints.potential import PotentialConstraint as PotentialConstraint
from tokenloom.decode.constraints.predicate import PredicateConstraint as PredicateConstraint
from tokenloom.decode.constraints.protocol import Constraint as Constraint
from tokenloom.decode.constraints.protocol import allowed as allowed
from tokenloom.decode.constraints.protocol import describe as describe
from tokenloom.decode.constraints.protocol import ending_with as ending_with
from tokenloom.decode.constraints.written import Written as Written
from tokenloom.decode.constraints.written import read as read
