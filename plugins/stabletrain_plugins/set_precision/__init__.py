"""Choose the number formats of a training, with modules kept in fp32, a watched loss scale and a report at the end."""
