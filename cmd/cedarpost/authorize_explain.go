package main

import (
	"fmt"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// printExplanation prints an explanation, a paragraph for each policy.
func (c *console) printExplanation(x *cedarpostv1.Explanation) {
	fmt.Fprintf(c.out, "\n%s\n", clean(x.GetSummary()))
	for _, p := range x.GetPolicies() {
		effect := "permit"
		if p.GetForbid() {
			effect = "forbid"
		}
		word, color := "satisfied", green
		switch p.GetOutcome() {
		case cedarpostv1.PolicyExplanation_SATISFIED:
			if p.GetForbid() {
				color = red
			}
		case cedarpostv1.PolicyExplanation_FAILED:
			word, color = "failed", red
		case cedarpostv1.PolicyExplanation_CONDITION_FALSE:
			word, color = "not satisfied", yellow
		default:
			word, color = "does not match", ""
		}
		if color != "" {
			word = c.paint(color, word)
		}
		where := ""
		if p.GetFile() != "" {
			where = fmt.Sprintf("  (%s:%d)", clean(p.GetFile()), p.GetLine())
		}
		fmt.Fprintf(c.out, "\n%s %s: %s%s\n", effect, clean(policyText(p.GetPolicy())), word, where)
		c.pair("fields", strings.Join(p.GetPaths(), ", "))
		c.pair("why", p.GetReason())
		c.pair("condition", p.GetCondition())
		for _, v := range p.GetValues() {
			fmt.Fprintf(c.out, "  %-12s %s = %s\n", "", clean(v.GetExpression()), clean(v.GetValue()))
		}
	}
	if n := x.GetOmitted(); n > 0 {
		fmt.Fprintf(c.out, "\nand %s that this list leaves out\n", count(n, "policy", "policies"))
	}
}
