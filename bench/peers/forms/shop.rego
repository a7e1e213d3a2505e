# The example shop for OPA: who may view an order, and which of its fields. data.users and
# data.orders are the shop's entities.
package shop

answer := decide(input)

# OPA has no batch call, so a list of questions is one input.
answers := [decide(question) | some question in input.questions]

# The owner sees personal data without a second factor.
decide(q) := {"allow": true, "permitted": asked(q) & (visible.owner | seen(user.roles))} if {
	user := data.users[q.principal]
	user.suspended == false
	data.orders[q.order].owner == q.principal
} else := {"allow": true, "permitted": asked(q) & (seen(user.roles) - hidden(q.mfa))} if {
	user := data.users[q.principal]
	user.suspended == false
	count(user.roles) > 0
	data.orders[q.order]
} else := {"allow": false, "permitted": []}

asked(q) := {field | some field in q.fields}

seen(roles) := union({visible[role] | some role in roles})

hidden(mfa) := set() if mfa
else := personal

personal := {"customer.name", "customer.email", "shipping.address"}

visible := {
	"owner": {"id", "status", "items", "total", "customer.name", "customer.email", "shipping.address"},
	"support": {"id", "status", "items", "customer.name", "customer.email", "shipping.address"},
	"finance": {"id", "status", "items", "total", "internal.margin"},
	"manager": {"id", "status", "items", "total", "customer.name", "customer.email", "shipping.address", "internal.margin", "internal.notes"},
}
