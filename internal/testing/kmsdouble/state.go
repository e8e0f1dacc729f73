package kmsdouble

import "time"

// State is a key's state, as the vendor spells it.
type State string

// The states of a key. Only an enabled key encrypts and decrypts.
const (
	Enabled         State = "Enabled"
	Disabled        State = "Disabled"
	PendingDeletion State = "PendingDeletion"
	PendingImport   State = "PendingImport"
)

// SetState changes a key's state. It panics on an unknown key.
func (d *Double) SetState(keyID string, s State) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	k := d.mustKey(keyID)
	k.state, k.deleteAt = s, time.Time{}
	if s == PendingDeletion {
		k.deleteAt = d.now().Add(7 * 24 * time.Hour)
	}
}

// ImportMaterial gives a key the same imported material again, until a time; zero for ever. It
// panics on an unknown key.
func (d *Double) ImportMaterial(keyID string, until time.Time) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	d.mustKey(keyID).materialExpires = until
}

// stateAt returns the key's state at a time: an enabled key whose material has expired waits for
// it.
func (k *key) stateAt(now time.Time) State {
	if k.state == Enabled && !k.materialExpires.IsZero() && !now.Before(k.materialExpires) {
		return PendingImport
	}
	return k.state
}

// usable is the error of a cryptographic operation in the key's state, or nil.
func (k *key) usable(now time.Time) *apiError {
	if k.product {
		return &apiError{403, "Forbidden.NoPermission", "This operation for " + k.id + " is forbidden by permission system."}
	}
	switch k.stateAt(now) {
	case Enabled:
		return nil
	case Disabled:
		return &apiError{409, "Rejected.Disabled", "The request was rejected because the key state is Disabled."}
	case PendingDeletion:
		return &apiError{409, "Rejected.PendingDeletion", "The request was rejected because the key state is PendingDeletion."}
	case PendingImport:
		return &apiError{409, "Rejected.PendingImport", "The request was rejected because the key state is PendingImport."}
	}
	return &apiError{409, "Rejected.Unavailable", "The request was rejected because the key state is unavailable."}
}
