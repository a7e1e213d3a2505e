package logformat

import (
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// ocsfVersion is the version of the Open Cybersecurity Schema Framework (schema.ocsf.io) that
// the lines conform to. The rules named in this file are those of that version.
// docs/audit.md has the mapping as a table.
const ocsfVersion = "1.6.0"

// object is a JSON object. encoding/json sorts its keys, so equal rows make equal lines.
type object = map[string]any

// ocsfClass is an event class of the schema.
type ocsfClass struct {
	uid      int
	name     string
	category string
}

// The event classes in use: API Activity is in category 6, the other two are in category 3.
var (
	apiActivity      = ocsfClass{6003, "API Activity", "Application Activity"}
	authentication   = ocsfClass{3002, "Authentication", "Identity & Access Management"}
	entityManagement = ocsfClass{3004, "Entity Management", "Identity & Access Management"}
)

// The values in use of activity_id, which each class defines, of severity_id of the base
// event, and of type_id of a user and of a managed entity.
const (
	activityLogon  = 1 // of Authentication
	activityCreate = 1
	activityRead   = 2
	activityUpdate = 3
	activityDelete = 4
	activityOther  = 99

	severityInformational = 1
	severityLow           = 2
	severityMedium        = 3
	severityHigh          = 4

	typeOther = 99
)

var (
	ocsfActivities = map[ocsfClass]map[int]string{
		apiActivity:      {activityRead: "Read", activityOther: "Other"},
		authentication:   {activityLogon: "Logon"},
		entityManagement: {activityCreate: "Create", activityUpdate: "Update", activityDelete: "Delete"},
	}
	ocsfSeverities = map[int]string{severityInformational: "Informational", severityLow: "Low", severityMedium: "Medium", severityHigh: "High"}
)

// OCSF returns a row of a batch as a line of JSON: an event of OCSF 1.6.0. A decision, a read
// of the log and a damaged row are events of class 6003, failed authentication is of class
// 3002, and a change is of class 3004. version is the version of Cedarpost that exports.
func OCSF(b *cedarpostv1.ExportDecisionsResponse, row int, version string) (string, error) {
	e := b.GetEntries()[row]
	var o object
	if d := DamageOf(e); d != nil {
		o = ocsfDamage(b, row, d)
	} else if d := e.GetDecision(); d != nil {
		o = ocsfDecision(d)
	} else {
		o = ocsfEvent(e.GetEvent())
	}
	o["metadata"].(object)["product"] = object{"name": "Cedarpost", "vendor_name": "Cedarpost", "version": version}
	unmapped := o["unmapped"].(object)
	unmapped["leaf"], unmapped["row"] = b.GetLeaf(), row
	var line strings.Builder
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	err := enc.Encode(o)
	return line.String(), err
}

// ocsfHead returns the attributes that every class has. The base event defines category_uid
// and type_uid as computed from class_uid and activity_id.
func ocsfHead(class ocsfClass, activity, severity int, at *timestamppb.Timestamp, id, log, message string) object {
	name := ocsfActivities[class][activity]
	return object{
		"class_uid": class.uid, "class_name": class.name,
		"category_uid": class.uid / 1000, "category_name": class.category,
		"activity_id": activity, "activity_name": name,
		"type_uid": class.uid*100 + activity, "type_name": class.name + ": " + name,
		"severity_id": severity, "severity": ocsfSeverities[severity],
		"time": millis(at), "message": message,
		"metadata": object{"version": ocsfVersion, "uid": id, "log_name": log},
		"unmapped": object{},
	}
}

// millis converts a time to timestamp_t of the schema: milliseconds since 1970.
func millis(t *timestamppb.Timestamp) int64 { return t.AsTime().UnixMilli() }

// controlled adds whether a check let a request through: action and disposition of the
// profile security_control.
func controlled(o object, allowed bool) {
	o["action_id"], o["action"], o["disposition_id"], o["disposition"] = 2, "Denied", 2, "Blocked"
	if allowed {
		o["action_id"], o["action"], o["disposition_id"], o["disposition"] = 1, "Allowed", 1, "Allowed"
	}
	addProfile(o, "security_control")
}

// succeeded adds status_id of the base event.
func succeeded(o object, ok bool) {
	o["status_id"], o["status"] = 2, "Failure"
	if ok {
		o["status_id"], o["status"] = 1, "Success"
	}
}

// addProfile lists a profile in metadata.profiles, which an event needs for each profile whose
// attributes it has.
func addProfile(o object, name string) {
	meta := o["metadata"].(object)
	list, _ := meta["profiles"].([]string)
	meta["profiles"] = append(list, name)
}

// correlated adds the ids of the request that a row comes from. Of the classes in use, only API
// Activity has the profile trace.
func correlated(o object, class ocsfClass, requestID, traceID string) {
	if requestID != "" {
		o["metadata"].(object)["correlation_uid"] = requestID
	}
	switch {
	case traceID == "":
	case class == apiActivity:
		o["trace"] = object{"uid": traceID}
		addProfile(o, "trace")
	default:
		o["unmapped"].(object)["trace_id"] = traceID
	}
}

// named returns an object that has only a name. The schema does not allow an empty name.
func named(name string) object {
	if name == "" {
		name = "unknown"
	}
	return object{"name": name}
}

// entityObject returns an entity. The id of an entity can be empty, and a name cannot.
func entityObject(u *cedarpostv1.EntityUid) object {
	o := object{"uid": uidText(u), "type": u.GetType()}
	if u.GetId() != "" {
		o["name"] = u.GetId()
	}
	return o
}

// ocsfDecision maps a decision to API Activity, which requires actor, api and src_endpoint. The
// log does not know the address of a caller, so the endpoints have names. policy and
// authorizations are of the profile security_control.
func ocsfDecision(d *cedarpostv1.DecisionRecord) object {
	allowed := d.GetDecision() == cedarpostv1.Decision_ALLOW
	outcome, severity := d.GetDecision().String(), severityInformational
	if !allowed {
		severity = severityLow
		if d.DeniedAt != nil {
			outcome += " at " + d.GetDeniedAt().String()
		}
	}
	principal, action, resource := uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource())
	o := ocsfHead(apiActivity, activityOther, severity, d.GetTime(), d.GetDecisionId(), "decisions",
		principal+" "+action+" "+resource+": "+outcome)
	controlled(o, allowed)
	succeeded(o, allowed)
	o["status_detail"] = outcome
	user := entityObject(d.GetPrincipal())
	user["type_id"] = typeOther
	o["actor"] = object{"user": user, "app_name": d.GetCaller()}
	api := object{"operation": action, "service": named(d.GetCaller())}
	if id := d.GetRequestId(); id != "" {
		api["request"] = object{"uid": id}
	}
	o["api"] = api
	o["src_endpoint"], o["dst_endpoint"] = named(d.GetCaller()), named(d.GetServer())
	o["resources"] = []object{entityObject(d.GetResource())}
	var authorizations []object
	for _, p := range d.GetDeterminingPolicies() {
		policy := object{"uid": policyText(p), "name": p.GetId(), "is_applied": true}
		if authorizations == nil {
			o["policy"] = policy
		}
		authorizations = append(authorizations, object{"decision": d.GetDecision().String(), "policy": policy})
	}
	if authorizations != nil {
		o["authorizations"] = authorizations
	}
	correlated(o, apiActivity, d.GetRequestId(), d.GetTraceId())
	more := o["unmapped"].(object)
	more["revision"], more["engine"] = d.GetRevision(), d.GetEngine()
	if f := d.GetFields(); f != nil {
		more["fields_permitted"], more["fields_denied"] = f.GetPermitted(), f.GetDenied()
	}
	return o
}

// ocsfDamage maps a damaged or missing row to API Activity. The base event requires time, and a
// missing row has none, so the event has the time when its batch was made. The header of the
// batch has that time; if the header is damaged too, time is left out.
func ocsfDamage(b *cedarpostv1.ExportDecisionsResponse, row int, d *Damage) object {
	id, log, at := d.ID, d.Of+"s", d.Time
	if d.Of == "" {
		id, log = fmt.Sprintf("leaf %d row %d", b.GetLeaf(), row), "log"
	}
	if at == nil {
		if h, err := auditlog.ParseHeader(b.GetHeader()); err == nil {
			at = timestamppb.New(h.Made)
		}
	}
	o := ocsfHead(apiActivity, activityOther, severityMedium, at, id, log, "a row of the log is "+d.Kind+": "+d.Reason)
	if at == nil {
		delete(o, "time")
	}
	o["metadata"].(object)["event_code"] = d.Kind
	o["actor"] = object{"user": named("")}
	o["api"] = object{"operation": "ExportDecisions", "service": named("Cedarpost")}
	o["src_endpoint"], o["dst_endpoint"] = named(""), named("")
	succeeded(o, false)
	o["status_detail"] = d.Reason
	return o
}
