package logformat

import (
	"encoding/hex"
	"net/netip"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// ocsfEvent maps an event. A call of this service is API Activity, a change is Entity
// Management, and failed authentication is Authentication.
func ocsfEvent(v *cedarpostv1.EventRecord) object {
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
	// call maps a call of this service.
	call := func(activity, severity int, procedure, message string) object {
		o := head(apiActivity, activity, severity, message)
		o["actor"] = object{"user": named(v.GetCaller())}
		o["api"] = object{"operation": procedure, "service": named("Cedarpost")}
		o["src_endpoint"], o["dst_endpoint"] = named(v.GetCaller()), named(v.GetServer())
		return o
	}
	// managed maps a change of something that this service stores.
	managed := func(activity, severity int, typ, name, operation string) object {
		o := head(entityManagement, activity, severity, strings.TrimSpace(operation+" "+name))
		actor := v.GetCaller()
		if actor == "" {
			actor = v.GetServer() // no caller asked for it
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
	case *cedarpostv1.EventRecord_PublishRefused:
		p := d.PublishRefused
		o := call(activityOther, severityMedium, "ApplyBundle", PublishRefusedText(p))
		controlled(o, false)
		succeeded(o, false)
		o["status_detail"] = p.GetReason()
		o["resources"] = []object{{"name": named(p.GetBundle())["name"], "type": "bundle"}}
		counted(o, p.GetCount(), p.GetFirst().AsTime(), p.GetLast().AsTime())
		more := o["unmapped"].(object)
		more["dry_run"], more["finding_count"], more["findings"] = p.GetDryRun(), p.GetFindingCount(), append([]string{}, p.GetFindings()...)
		return o
	case *cedarpostv1.EventRecord_Probing:
		p := d.Probing
		o := call(activityOther, severityLow, "Authorize", ProbingText(p))
		counted(o, p.GetCount(), p.GetFirst().AsTime(), p.GetLast().AsTime())
		more := o["unmapped"].(object)
		more["reason"], more["principal"], more["example"] = p.GetReason(), p.GetPrincipal(), p.GetExample()
		return o
	case *cedarpostv1.EventRecord_BreakGlass:
		g := d.BreakGlass
		o := managed(activityUpdate, severityHigh, "bundle", v.GetSubject(), "BreakGlass")
		o["status_detail"] = BreakGlassText(g)
		more := o["unmapped"].(object)
		more["version"], more["change"], more["reason"], more["rules"] = g.GetVersion(), g.GetChange(), g.GetReason(), append([]string{}, g.GetRules()...)
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
	case *cedarpostv1.EventRecord_ServerStarted:
		r := d.ServerStarted
		o := managed(activityUpdate, severityInformational, "server", v.GetSubject(), "ServerStarted")
		more := o["unmapped"].(object)
		more["version"], more["settings_digest"], more["summary"] = r.GetVersion(), r.GetSettingsDigest(), ServerStartedText(r)
		return o
	case *cedarpostv1.EventRecord_LogTruncated:
		o := managed(activityDelete, severityMedium, "end of the log", v.GetSubject(), "LogTruncated")
		o["unmapped"].(object)["statement"] = d.LogTruncated.GetStatement()
		return o
	case *cedarpostv1.EventRecord_Reuse:
		o := call(activityOther, severityInformational, "ReportReuse", ReuseText(d.Reuse))
		ocsfReuse(o, d.Reuse)
		return o
	case *cedarpostv1.EventRecord_FailedOpen:
		o := call(activityOther, severityMedium, "ReportReuse", FailedOpenText(d.FailedOpen))
		controlled(o, true)
		ocsfFailedOpen(o, d.FailedOpen)
		return o
	}
	// The server is newer, and records a kind that this version does not know.
	return call(activityOther, severityInformational, kind, kind+" "+v.GetSubject())
}

// ocsfChange maps a change. It is Create if nothing was stored before, Delete if nothing is
// stored after, and Update otherwise.
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
