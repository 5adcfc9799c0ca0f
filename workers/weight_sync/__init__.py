"""Moving a version's weights from the learner to the generators."""
