"""What all tables share.

Times are whole microseconds since 1970 in UTC: fine enough to order by, and the same number in every database. Money is
whole micro-units (millionths) of the currency that prices are given in, so that sums are exact.
"""

from __future__ import annotations

from sqlalchemy import MetaData

# Named constraints can be altered by later migrations on every database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)
