package main

import (
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// ocsfVersion is the version of the Open Cybersecurity Schema Framework that the
// lines are of. docs/audit.md has the mapping as a table.
const ocsfVersion = "1.6.0"

// object is a JSON object. encoding/json sorts its keys, so equal rows make equal
// lines.
type object = map[string]any

// ocsfClass is an event class of the schema.
type ocsfClass struct {
	uid      int
	name     string
	category string
}

var (
	apiActivity      = ocsfClass{6003, "API Activity", "Application Activity"}
	authentication   = ocsfClass{3002, "Authentication", "Identity & Access Management"}
	entityManagement = ocsfClass{3004, "Entity Management", "Identity & Access Management"}
)

// The enumerations of the schema that are used.
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

	typeOther = 99
)

var (
	ocsfActivities = map[ocsfClass]map[int]string{
		apiActivity:      {activityRead: "Read", activityOther: "Other"},
		authentication:   {activityLogon: "Logon"},
		entityManagement: {activityCreate: "Create", activityUpdate: "Update", activityDelete: "Delete"},
	}
	ocsfSeverities = map[int]string{severityInformational: "Informational", severityLow: "Low", severityMedium: "Medium"}
)

// ocsfLine is a row of the log as an event of the schema.
func ocsfLine(leaf int64, row int, e *cedarpostv1.LogEntry) (string, error) {
	var o object
	if d := damageOf(e); d != nil {
		o = ocsfDamage(leaf, row, d)
	} else if d := e.GetDecision(); d != nil {
		o = ocsfDecision(d)
	} else {
		o = ocsfOther(e.GetEvent())
	}
	unmapped := o["unmapped"].(object)
	unmapped["leaf"], unmapped["row"] = leaf, row
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(o)
	return b.String(), err
}

// ocsfHead is what all classes have.
func ocsfHead(class ocsfClass, activity, severity int, at *timestamppb.Timestamp, id, log, message string) object {
	version, _ := buildVersion()
	name := ocsfActivities[class][activity]
	return object{
		"class_uid": class.uid, "class_name": class.name,
		"category_uid": class.uid / 1000, "category_name": class.category,
		"activity_id": activity, "activity_name": name,
		"type_uid": class.uid*100 + activity, "type_name": class.name + ": " + name,
		"severity_id": severity, "severity": ocsfSeverities[severity],
		"time": millis(at), "message": message,
		"metadata": object{
			"version": ocsfVersion, "uid": id, "log_name": log,
			"product": object{"name": "Cedarpost", "vendor_name": "Cedarpost", "version": version},
		},
		"unmapped": object{},
	}
}

func millis(t *timestamppb.Timestamp) int64 { return t.AsTime().UnixMilli() }

// controlled adds what a control let through or stopped, of the profile
// security_control.
func controlled(o object, allowed bool) {
	o["action_id"], o["action"], o["disposition_id"], o["disposition"] = 2, "Denied", 2, "Blocked"
	if allowed {
		o["action_id"], o["action"], o["disposition_id"], o["disposition"] = 1, "Allowed", 1, "Allowed"
	}
	addProfile(o, "security_control")
}

func succeeded(o object, ok bool) {
	o["status_id"], o["status"] = 2, "Failure"
	if ok {
		o["status_id"], o["status"] = 1, "Success"
	}
}

func addProfile(o object, name string) {
	meta := o["metadata"].(object)
	list, _ := meta["profiles"].([]string)
	meta["profiles"] = append(list, name)
}

// correlated adds the ids of the request that a row comes from.
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

// named makes an object of a name; the empty one is none of the schema's.
func named(name string) object {
	if name == "" {
		name = "unknown"
	}
	return object{"name": name}
}

// entityObject is an entity; its id may be the empty text, which is no name.
func entityObject(u *cedarpostv1.EntityUid) object {
	o := object{"uid": uidText(u), "type": u.GetType()}
	if u.GetId() != "" {
		o["name"] = u.GetId()
	}
	return o
}

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

// ocsfOther maps what is not a decision.
func ocsfOther(v *cedarpostv1.EventRecord) object {
	kind := strings.ToLower(v.GetKind().String())
	head := func(class ocsfClass, activity, severity int, message string) object {
		o := ocsfHead(class, activity, severity, v.GetTime(), v.GetEventId(), "events", message)
		o["metadata"].(object)["event_code"] = kind
		correlated(o, class, v.GetRequestId(), v.GetTraceId())
		if v.GetRevision() != 0 {
			o["unmapped"].(object)["revision"] = v.GetRevision()
		}
		return o
	}
	// call is a call of this service's own API.
	call := func(activity, severity int, procedure, message string) object {
		o := head(apiActivity, activity, severity, message)
		o["actor"] = object{"user": named(v.GetCaller())}
		o["api"] = object{"operation": procedure, "service": named("Cedarpost")}
		o["src_endpoint"], o["dst_endpoint"] = named(v.GetCaller()), named(v.GetServer())
		return o
	}
	// managed is a change of something that this service keeps.
	managed := func(activity, severity int, typ, name, operation string) object {
		o := head(entityManagement, activity, severity, strings.TrimSpace(operation+" "+name))
		actor := v.GetCaller()
		if actor == "" {
			actor = v.GetServer() // it did so by itself
		}
		o["actor"], o["comment"] = object{"user": named(actor)}, operation
		o["entity"] = object{"name": named(name)["name"], "type": typ, "type_id": typeOther}
		succeeded(o, true)
		return o
	}
	switch d := v.GetDetail().(type) {
	case *cedarpostv1.EventRecord_Change:
		return ocsfChange(v, d.Change, managed)
	case *cedarpostv1.EventRecord_AuthenticationFailure:
		f := d.AuthenticationFailure
		o := head(authentication, activityLogon, severityMedium, f.GetReason()+" from "+f.GetAddress())
		controlled(o, false)
		succeeded(o, false)
		o["status_detail"], o["is_remote"], o["count"] = f.GetReason(), true, max(f.GetCount(), 1)
		o["user"], o["service"], o["dst_endpoint"] = named(v.GetCaller()), named("Cedarpost"), named(v.GetServer())
		if f.GetFirst() != nil && f.GetLast() != nil {
			o["start_time"], o["end_time"] = millis(f.GetFirst()), millis(f.GetLast())
		}
		o["src_endpoint"] = named(f.GetAddress())
		if ip, err := netip.ParseAddr(f.GetAddress()); err == nil {
			o["src_endpoint"] = object{"ip": ip.WithZone("").String()}
		}
		o["unmapped"].(object)["procedure"] = f.GetProcedure()
		return o
	case *cedarpostv1.EventRecord_RefusedRight:
		o := call(activityOther, severityMedium, d.RefusedRight.GetProcedure(), d.RefusedRight.GetReason())
		controlled(o, false)
		succeeded(o, false)
		o["status_detail"] = d.RefusedRight.GetReason()
		return o
	case *cedarpostv1.EventRecord_LogRead:
		o := call(activityRead, severityInformational, d.LogRead.GetProcedure(), "the log was read")
		controlled(o, true)
		succeeded(o, true)
		o["resources"] = []object{{"name": "decision log", "type": "log"}}
		more := o["unmapped"].(object)
		more["rows"], more["request"] = d.LogRead.GetRows(), d.LogRead.GetRequest()
		return o
	case *cedarpostv1.EventRecord_RetentionDrop:
		o := managed(activityDelete, severityLow, "day of the log", d.RetentionDrop.GetDay(), "RetentionDrop")
		more := o["unmapped"].(object)
		more["decisions"], more["events"] = d.RetentionDrop.GetDecisions(), d.RetentionDrop.GetEvents()
		return o
	case *cedarpostv1.EventRecord_CheckpointKey:
		return managed(activityCreate, severityInformational, "checkpoint key", d.CheckpointKey.GetVerifierKey(), "CheckpointKey")
	case *cedarpostv1.EventRecord_StateRoot:
		r := d.StateRoot
		o := managed(activityCreate, severityInformational, "state root", v.GetSubject(), "StateRoot")
		more := o["unmapped"].(object)
		more["root"], more["entities"], more["bundles"], more["keys"] = hex.EncodeToString(r.GetRoot()), r.GetEntities(), r.GetBundles(), r.GetKeys()
		return o
	case *cedarpostv1.EventRecord_DatabaseRenewed:
		r := d.DatabaseRenewed
		o := managed(activityUpdate, severityMedium, "database", r.GetAfter(), "DatabaseRenewed")
		more := o["unmapped"].(object)
		more["before"], more["copied"] = r.GetBefore(), r.GetCopied()
		return o
	case *cedarpostv1.EventRecord_LogTruncated:
		o := managed(activityDelete, severityMedium, "end of the log", v.GetSubject(), "LogTruncated")
		o["unmapped"].(object)["statement"] = d.LogTruncated.GetStatement()
		return o
	case *cedarpostv1.EventRecord_Reuse:
		o := call(activityOther, severityInformational, "ReportReuse", reuseText(d.Reuse))
		ocsfReuse(o, d.Reuse)
		return o
	case *cedarpostv1.EventRecord_FailedOpen:
		o := call(activityOther, severityMedium, "ReportReuse", failedOpenText(d.FailedOpen))
		controlled(o, true)
		ocsfFailedOpen(o, d.FailedOpen)
		return o
	}
	// A kind that this version does not know.
	return call(activityOther, severityInformational, kind, kind+" "+v.GetSubject())
}

// ocsfChange tells what a change was by what was there before and is after it.
func ocsfChange(v *cedarpostv1.EventRecord, d *cedarpostv1.Change, managed func(activity, severity int, typ, name, operation string) object) object {
	activity := activityUpdate
	switch {
	case len(d.GetBefore()) == 0:
		activity = activityCreate
	case len(d.GetAfter()) == 0:
		activity = activityDelete
	}
	typ := "entities"
	switch {
	case strings.Contains(d.GetOperation(), "Bundle"):
		typ = "bundle"
	case strings.Contains(d.GetOperation(), "Key"):
		typ = "key"
	}
	o := managed(activity, severityInformational, typ, v.GetSubject(), d.GetOperation())
	entity, more := o["entity"].(object), o["unmapped"].(object)
	if n := d.GetEntityCount(); n > 0 {
		more["entity_count"] = n
		entity["data"] = object{"entities": uidList(d.GetEntities())}
	}
	if d.GetVersion() > 0 {
		more["version"] = d.GetVersion()
	}
	if len(d.GetStored()) > 0 {
		more["stored"] = hex.EncodeToString(d.GetStored())
	}
	more["before"], more["after"] = hex.EncodeToString(d.GetBefore()), hex.EncodeToString(d.GetAfter())
	return o
}

func uidList(us []*cedarpostv1.EntityUid) []string {
	texts := make([]string, len(us))
	for i, u := range us {
		texts[i] = uidText(u)
	}
	return texts
}
