"""The imperative shell: controller, agent, session, and the records that they leave."""
