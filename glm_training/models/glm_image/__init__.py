"""GLM-Image: the AR half that writes tokens (`ar`), the DiT half that renders them (`dit`), both (`family`)."""
