# The example shop for OPA: who may view an order, and which of its fields. data.users and
# data.orders are the shop's entities, data.visible and data.personal its field groups.
package shop

answer := decide(input)

# OPA has no batch call, so a list of questions is one input.
answers := [decide(question) | some question in input.questions]

default decide(_) := {"allow": false, "permitted": []}

decide(q) := {"allow": true, "permitted": permitted} if {
	user := data.users[q.principal]
	not user.suspended
	order := data.orders[q.order]
	relations := {r | some r in user.roles} | {"owner" | order.owner == q.principal}
	count(relations) > 0
	permitted := [f | some f in q.fields; seen(relations, f); not hidden(q, order, f)]
}

seen(relations, field) if {
	some r in relations
	data.visible[r][field]
}

# Personal data needs a second factor, unless the principal owns the order.
hidden(q, order, field) if {
	data.personal[field]
	not q.mfa
	order.owner != q.principal
}
